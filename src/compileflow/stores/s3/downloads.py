"""Blobs on their way down, each byte checked, and the cache that opened folders are linked from."""

from __future__ import annotations

import hashlib
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from compileflow.contracts import FileRecord
from compileflow.contracts.digests import file_digest
from compileflow.errors import StoreUnavailableError
from compileflow.stores.layout import bad_blob, blob_key
from compileflow.stores.s3.client import code_of, s3_errors
from compileflow.stores.s3.objects import S3Objects

_BLOCK = 2**20
_TRIES = 4
_PAUSE_S = 0.2


def fetch_blob(objects: S3Objects, record: FileRecord, out: Path, on_bytes: Callable[[int], None]) -> None:
    """Download a blob; `out` appears whole and verified, or not at all.

    A reply that breaks off is gone on with where it broke off. Bytes that are wrong are fetched once more, in
    case it was the way that spoilt them.

    Args:
        objects: Where the blob is.
        record: Its size and SHA-256.
        out: The file to make; its folder must exist.
        on_bytes: Told what came, in bytes.

    Raises:
        IntegrityError: the blob is absent or altered.
        StoreUnavailableError: no answer, or none that did not break off.
    """
    partial = out.with_name(f"{uuid.uuid4().hex}.part")
    try:
        for _ in range(2):
            with partial.open("wb", buffering=0) as stream:
                if _stream(objects, record, stream, on_bytes) == record.sha256:
                    break
        else:
            raise bad_blob(objects.uri, record)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


def _stream(objects: S3Objects, record: FileRecord, out: BinaryIO, on_bytes: Callable[[int], None]) -> str:
    """Write a blob's bytes and return their SHA-256."""
    from botocore.exceptions import BotoCoreError
    from urllib3.exceptions import HTTPError

    done = hashlib.sha256()
    have = 0
    for attempt in range(_TRIES):
        try:
            # boto3 itself tries again only until the body begins.
            body = _open(objects, record, have)
            while block := body.read(_BLOCK):
                have += len(block)
                if have > record.size_bytes:
                    raise bad_blob(objects.uri, record)
                done.update(block)
                out.write(block)
                on_bytes(len(block))
            return done.hexdigest()
        # What TLS finds wrong in a body comes past boto3 as it is.
        except (BotoCoreError, HTTPError) as error:
            if attempt + 1 == _TRIES:
                raise StoreUnavailableError(
                    f"{objects.uri}: {record.path} broke off after {have} of {record.size_bytes} bytes, "
                    f"{_TRIES} times: {type(error).__name__}.",
                    hint="Check the network, or try again later.",
                ) from error
            time.sleep(_PAUSE_S * 2**attempt)
    raise AssertionError("the last try returns or raises")


def _open(objects: S3Objects, record: FileRecord, offset: int) -> Any:
    from botocore.exceptions import ClientError

    from_there = {"Range": f"bytes={offset}-"} if offset else {}
    with s3_errors(objects.uri, "read"):
        try:
            reply = objects.client.get_object(**objects.place(blob_key(record.sha256)), **from_there)
        except ClientError as error:
            # InvalidRange: it is shorter than what came before it broke off.
            if code_of(error) in ("NoSuchKey", "InvalidRange"):
                raise bad_blob(objects.uri, record) from error
            raise
    if offset and "ContentRange" not in reply:
        raise StoreUnavailableError(
            f"{objects.uri}: the server sends only whole objects, and one broke off.", hint="Try again later."
        )
    return reply["Body"]


class BlobCache:
    """Verified blobs on this machine, which any process may add to, and which may be deleted at any time.

    Args:
        root: Its folder. blobs are below sha256/, unfinished work below tmp/.
    """

    def __init__(self, root: Path):
        self.root = root

    def find(self, record: FileRecord) -> Path | None:
        """Return a cached blob after hashing it again; None when it is absent or altered."""
        path = self._path(record)
        try:
            if path.stat().st_size == record.size_bytes and file_digest(path) == record.sha256:
                return path
        except FileNotFoundError:
            pass
        return None

    def add(self, record: FileRecord, finished: Path) -> Path:
        """Take in a verified file of the same file system, atomically; nobody may write to it from now on."""
        path = self._path(record)
        finished.chmod(0o444)
        path.parent.mkdir(parents=True, exist_ok=True)
        finished.replace(path)
        return path

    def copy(self, record: FileRecord, out: Path) -> bool:
        """Copy a blob, if it is here and unaltered, and say whether it was: a file that may be written to."""
        try:
            shutil.copyfile(self._path(record), out)
        except FileNotFoundError:
            return False
        if out.stat().st_size == record.size_bytes and file_digest(out) == record.sha256:
            return True
        out.unlink()
        return False

    def _path(self, record: FileRecord) -> Path:
        return self.root / "sha256" / record.sha256[:2] / record.sha256
