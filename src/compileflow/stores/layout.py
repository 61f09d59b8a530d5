"""The layout that all stores share: paths of listings, blobs and records, their formats, and errors about them.

blobs/sha256/ab/<sha256>             one file of a folder
manifests/sha256/<digest>.json       the listing of a folder, written last as the commit mark
records/<kind>/<key>.json            small pointers, which may be replaced
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Annotated

from pydantic import BaseModel, FailFast, JsonValue, ValidationError

from compileflow.contracts import FileRecord
from compileflow.contracts.json_files import MOST_JSON_BYTES, parse_json
from compileflow.errors import IntegrityError, ManifestError, StoreError, StoreUnavailableError, first_problem

logger = logging.getLogger(__name__)

# A listing of 400,000 files. A record has a few kilobytes.
MOST_LISTING_BYTES = MOST_JSON_BYTES
MOST_RECORD_BYTES = 16 * 2**20
BLOBS = "blobs/sha256/"
LISTINGS = "manifests/sha256/"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_URI = re.compile(r"(?P<store>[a-z0-9]+://.+)/manifests/sha256/(?P<digest>[0-9a-f]{64})\.json")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# More levels than `list_files` can walk.
_MOST_FOLDERS = 500


class _Listing(BaseModel):
    files: Annotated[tuple[FileRecord, ...], FailFast()]


def blob_key(sha256: str) -> str:
    """Return the path of a blob, relative to the store."""
    return f"{BLOBS}{sha256[:2]}/{sha256}"


def listing_key(digest: str) -> str:
    """Return the path of a listing, relative to the store.

    Raises:
        IntegrityError: The text is not a digest. It could name any other path.
    """
    if not is_digest(digest):
        raise IntegrityError(f"Expected a digest of 64 hex digits, got {digest!r}.", hint="Check the digest.")
    return f"{LISTINGS}{digest}.json"


def is_digest(text: str) -> bool:
    """Say whether a text can name a blob or a listing."""
    return _DIGEST.fullmatch(text) is not None


def is_record_name(text: str) -> bool:
    """Say whether a text can be the kind or the key of a record."""
    return _NAME.fullmatch(text) is not None


def records_key(kind: str) -> str:
    """Return the path of all records of a kind, relative to the store, with a slash at the end."""
    return record_key(kind, "any").removesuffix("any.json")


def record_key(kind: str, key: str) -> str:
    """Return the path of a record, relative to the store.

    Raises:
        StoreError: The kind or the key contains characters that are not allowed in a path.
    """
    if not is_record_name(kind) or not is_record_name(key):
        raise StoreError(
            f"{kind}/{key} is not a record's name.", hint="Use letters, digits, '.', '_' and '-' in both parts."
        )
    return f"records/{kind}/{key}.json"


def parse_listing(body: bytes, digest: str, location: str) -> tuple[FileRecord, ...]:
    """Return the files that a listing names.

    Args:
        body: Bytes of the listing.
        digest: Expected SHA-256 of `body`.
        location: Path or URI of the listing, for the error.

    Raises:
        IntegrityError: The bytes have another SHA-256, or are not the listing of a folder.
    """
    if hashlib.sha256(body).hexdigest() != digest:
        raise IntegrityError(
            f"The listing {location} was altered.", hint="Delete it and run again; the run writes a new one."
        )
    try:
        files = _Listing.model_validate(parse_json(body, MOST_LISTING_BYTES, strict=True)).files
        _check_paths(files)
    except ValidationError as error:
        raise bad_listing(location, first_problem(error)) from error
    except ValueError as error:
        raise bad_listing(location, error) from error
    return files


def _check_paths(files: Sequence[FileRecord]) -> None:
    """Refuse paths that no folder can have at once. The second file would be written over the first one."""
    names = sorted(f"{record.path}/" for record in files)
    for name, next_name in pairwise(names):
        # A file sorts right before whatever is named below it.
        if next_name.startswith(name):
            how = "twice" if next_name == name else "as a file and as a folder"
            raise ValueError(f"it names {name[:-1]!r:.200} {how}")
    if any(name.count("/") > _MOST_FOLDERS for name in names):
        raise ValueError("its folders are nested too deeply")


def bad_listing(location: str, problem: object) -> IntegrityError:
    """Return the error for something in the place of a listing that is not one."""
    return IntegrityError(
        f"{location} is not a listing: {problem}.", hint="Delete it; the next run that needs it writes a new one."
    )


def no_store(store_uri: str) -> StoreError:
    """Return the error for a store that does not exist."""
    return StoreError(f"The store {store_uri} does not exist.", hint="Check the URI of the store.")


def no_folder(store_uri: str, digest: str) -> IntegrityError:
    """Return the error for a folder that the store does not hold."""
    return IntegrityError(
        f"{store_uri} does not hold the folder {digest[:12]}...",
        hint="Check the URI against `compileflow versions --json`. If the folder was deleted, compile again.",
    )


def bad_blob(store_uri: str, record: FileRecord) -> IntegrityError:
    """Return the error for a blob that is missing or has other bytes than its name says."""
    return IntegrityError(
        f"{store_uri}: the blob {blob_key(record.sha256)} of the file {record.path} is missing or altered.",
        hint="Delete that blob and run again; the run writes a new one.",
    )


def changed_while_stored(path: object) -> StoreError:
    """Return the error for a file that another process changes during a put."""
    return StoreError(
        f"{path} changed while it was being stored.", hint="Run again when no other process writes to it."
    )


def collected_meanwhile(store_uri: str, folder: object) -> StoreError:
    """Return the error for a put whose objects a collection deletes again and again."""
    return StoreUnavailableError(
        f"{store_uri}: a garbage collection keeps deleting what the put of {folder} needs.",
        hint="Run again after the collection has ended, and collect with a minimum age of a day.",
    )


def record_body(value: dict[str, JsonValue]) -> bytes:
    """Return the bytes of a record."""
    return json.dumps(value, sort_keys=True, indent=1).encode()


def parse_record(body: bytes, location: str) -> dict[str, JsonValue] | None:
    """Return the value of a record; None if it cannot be used, so that it counts as missing. The log says why.

    Args:
        body: Bytes of the record.
        location: Path or URI of the record, for the log.
    """
    try:
        data = parse_json(body, MOST_RECORD_BYTES, strict=True)
    except ValueError as error:
        ignore_record(location, str(error))
        return None
    if isinstance(data, dict):
        return data
    ignore_record(location, "it is not a JSON object")
    return None


# A step looks a record up more than once.
@lru_cache(maxsize=256)
def ignore_record(location: str, problem: str) -> None:
    """Say in the log, once, why a record counts as missing."""
    logger.warning("ignoring the record %s: %s", location, problem)


def split_uri(uri: str) -> tuple[str, str]:
    """Split the URI of a stored folder into the URI of the store and the digest of the folder.

    Raises:
        ManifestError: The text is not the URI of a stored folder.
    """
    match = _URI.fullmatch(uri)
    if match is None:
        raise ManifestError(
            f"{without_user(uri)!r} is neither an artifact folder nor an artifact URI.",
            hint="Give a folder, a digest, registry:NAME, or STORE/manifests/sha256/DIGEST.json.",
        )
    return match["store"], match["digest"]


def without_user(uri: str) -> str:
    """Return a URI without everything before an @, which may be a secret, even one that contains a slash."""
    return re.sub(r"//.*@", "//...@", uri)
