"""Download blobs from S3, checking every byte and resuming where a reply breaks off."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from compileflow._process.folders import file_written_whole
from compileflow.contracts import FileRecord
from compileflow.errors import StoreUnavailableError
from compileflow.stores.layout import bad_blob, blob_key
from compileflow.stores.s3.errors import code_of, s3_errors
from compileflow.stores.s3.objects import S3Objects

_BLOCK_BYTES = 2**20
_ATTEMPTS = 4
_PAUSE_S = 0.2


def fetch_blob(objects: S3Objects, record: FileRecord, dest: Path, on_bytes: Callable[[int], None]) -> None:
    """Download a blob. `dest` appears complete and verified, or not at all.

    If the reply breaks off, the download resumes at that byte. If the bytes are wrong, the blob is downloaded once
    more, because they may have been damaged on the way.

    Args:
        objects: Objects of the store.
        record: Size and SHA-256 of the blob.
        dest: Path of the new file.
        on_bytes: Called with the number of bytes that arrived.

    Raises:
        IntegrityError: The blob is missing or altered.
        StoreUnavailableError: The server did not answer, or every reply broke off.
    """
    with file_written_whole(dest) as partial:
        for _ in range(2):
            with partial.open("wb", buffering=0) as stream:
                if _download(objects, record, stream, on_bytes) == record.sha256:
                    return
        raise bad_blob(objects.uri, record)


def stored_digest(objects: S3Objects, record: FileRecord) -> str:
    """Download a blob, keep nothing of it, and return the SHA-256 of its bytes.

    Raises:
        IntegrityError: The blob is missing, or larger than the record says.
        StoreUnavailableError: The server did not answer, or every reply broke off.
    """
    with open(os.devnull, "wb", buffering=0) as sink:
        return _download(objects, record, sink, lambda size_bytes: None)


def _download(objects: S3Objects, record: FileRecord, file: BinaryIO, on_bytes: Callable[[int], None]) -> str:
    """Write the bytes of a blob and return their SHA-256."""
    from botocore.exceptions import BotoCoreError
    from urllib3.exceptions import HTTPError

    blob_hash = hashlib.sha256()
    offset = 0
    for attempt in range(_ATTEMPTS):
        try:
            # boto3 retries only until the body begins.
            body = _open_at(objects, record, offset)
            while block := body.read(_BLOCK_BYTES):
                offset += len(block)
                if offset > record.size_bytes:
                    raise bad_blob(objects.uri, record)
                blob_hash.update(block)
                file.write(block)
                on_bytes(len(block))
            return blob_hash.hexdigest()
        # boto3 does not translate TLS errors in a body.
        except (BotoCoreError, HTTPError) as error:
            if attempt + 1 == _ATTEMPTS:
                raise StoreUnavailableError(
                    f"{objects.uri}: {record.path} broke off after {offset} of {record.size_bytes} bytes, "
                    f"{_ATTEMPTS} times: {type(error).__name__}.",
                    hint="Check the network, or try again later.",
                ) from error
            time.sleep(_PAUSE_S * 2**attempt)
    raise AssertionError("the last attempt returns or raises")


def _open_at(objects: S3Objects, record: FileRecord, offset: int) -> Any:
    from botocore.exceptions import ClientError

    byte_range = {"Range": f"bytes={offset}-"} if offset else {}
    with s3_errors(objects.uri, "read"):
        try:
            reply = objects.client.get_object(**objects.place(blob_key(record.sha256)), **byte_range)
        except ClientError as error:
            # InvalidRange: the object is now shorter than what has already arrived.
            if code_of(error) in ("NoSuchKey", "InvalidRange"):
                raise bad_blob(objects.uri, record) from error
            raise
    if offset and "ContentRange" not in reply:
        raise StoreUnavailableError(
            f"{objects.uri}: a download broke off, and the server sends only whole objects.",
            hint="Try again later.",
        )
    return reply["Body"]
