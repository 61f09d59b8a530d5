"""The layout that every store shares: where a listing, a blob and a record are, and what a listing says.

blobs/sha256/ab/<sha256>, manifests/sha256/<digest>.json (written last: the commit mark), and
records/<kind>/<key>.json, small pointers that may be replaced.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

from pydantic import JsonValue, ValidationError

from compileflow.contracts import FileRecord
from compileflow.errors import IntegrityError, ManifestError, StoreError, StoreUnavailableError

BLOBS = "blobs/sha256/"
LISTINGS = "manifests/sha256/"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_URI = re.compile(r"(?P<store>[a-z0-9]+://.+)/manifests/sha256/(?P<digest>[0-9a-f]{64})\.json")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def blob_key(sha256: str) -> str:
    """Return a blob's place, relative to the store."""
    return f"{BLOBS}{sha256[:2]}/{sha256}"


def listing_key(digest: str) -> str:
    """Return a listing's place.

    Raises:
        IntegrityError: that is no digest; it might name any other place.
    """
    if not is_digest(digest):
        raise IntegrityError(f"{digest!r} is no digest.", hint="A digest is 64 hex digits.")
    return f"{LISTINGS}{digest}.json"


def is_digest(text: str) -> bool:
    """Say whether this is the name of a blob or a listing."""
    return _DIGEST.fullmatch(text) is not None


def records_key(kind: str) -> str:
    """Return the place of all records of a kind, with a slash at its end."""
    return record_key(kind, "any").removesuffix("any.json")


def record_key(kind: str, key: str) -> str:
    """Return a record's place.

    Raises:
        StoreError: the kind or the key has characters that no place may have.
    """
    if not _NAME.fullmatch(kind) or not _NAME.fullmatch(key):
        raise StoreError(f"{kind}/{key} is no record's name.", hint="Use letters, digits, '.', '_' and '-'.")
    return f"records/{kind}/{key}.json"


def parse_listing(body: bytes, digest: str, where: str) -> tuple[FileRecord, ...]:
    """Return the files that a listing names.

    Args:
        body: The listing's bytes.
        digest: Their SHA-256.
        where: Place of the listing, for the error.

    Raises:
        IntegrityError: other bytes, or no listing.
    """
    if hashlib.sha256(body).hexdigest() != digest:
        raise IntegrityError(f"{where} was altered.", hint="Delete it and run again; it will be made anew.")
    try:
        data = json.loads(body)
        return tuple(FileRecord.model_validate(record) for record in data["files"])
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise IntegrityError(f"{where} is no listing: {error}.", hint="Do not use this store.") from error


def no_folder(store_uri: str, digest: str) -> IntegrityError:
    """Return the error for a folder that a store does not hold."""
    return IntegrityError(
        f"{store_uri} holds no folder {digest[:12]}...",
        hint="Check the URI; `compileflow versions` lists. A new run makes what was deleted.",
    )


def bad_blob(store_uri: str, record: FileRecord) -> IntegrityError:
    """Return the error for a blob that cannot be served."""
    return IntegrityError(
        f"{store_uri}: the blob of {record.path} is absent or altered.",
        hint="Delete that blob and run again; it will be made anew.",
    )


def changed_while_stored(path: object) -> StoreError:
    """Return the error for a file that somebody writes to while it is put."""
    return StoreError(f"{path} changed while it was being stored.", hint="Run again when nothing writes to it.")


def collected_meanwhile(store_uri: str, folder: object) -> StoreError:
    """Return the error for a put whose objects were deleted again and again while it ran."""
    return StoreUnavailableError(
        f"{store_uri}: a collection keeps deleting what putting {folder} relies on.",
        hint="Run it again when the collection is over, and collect with a minimum age of a day.",
    )


def record_body(value: dict[str, JsonValue]) -> bytes:
    """Return a record's bytes."""
    return json.dumps(value, sort_keys=True, indent=1).encode()


def parse_record(body: bytes) -> dict[str, JsonValue] | None:
    """Return what a record says; None where it is no JSON object, which counts as absent."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def link_or_copy(blob: Path, out: Path) -> None:
    """Show a blob under another name; a copy where the file system cannot link."""
    try:
        out.hardlink_to(blob)
    except OSError:
        # Another file system, or one without links.
        shutil.copyfile(blob, out)


def split_uri(uri: str) -> tuple[str, str]:
    """Split a stored folder's URI into the store's URI and the digest.

    Raises:
        ManifestError: it is not such a URI.
    """
    match = _URI.fullmatch(uri)
    if match is None:
        raise ManifestError(
            f"{_shown(uri)!r} is neither an artifact folder nor an artifact URI.",
            hint="Give a folder, registry:NAME, or STORE/manifests/sha256/DIGEST.json.",
        )
    return match["store"], match["digest"]


def _shown(uri: str) -> str:
    # Whatever stands before an @ may be a secret, also one with a slash in it.
    return re.sub(r"//.*@", "//...@", uri)
