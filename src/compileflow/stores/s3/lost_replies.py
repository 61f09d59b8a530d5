"""Writes to S3 whose replies may be lost: how a writer finds out that its request was carried out all the same.

Every write names the object that it expects to find (If-Match) or that it expects none (If-None-Match), so that
only one of several writers succeeds. boto3 repeats a request whose reply was lost. If the server carried out the
first one, it refuses the repetition, because the object has changed. A refusal therefore means that some process
has written the object, perhaps this one, and the writer looks at the object before it gives up:

- A blob is content-addressed. An object of the right size is the blob, unless it is the altered one that the
  write was to replace (`write_blob_once`).
- A listing is content-addressed as well (`S3Store._put_listing`).
- A lease contains the id of its holder (`write_if_unchanged_or_ours`).

A reply that breaks off in the middle of a download is handled elsewhere: see `fetch_blob` in blob_downloads.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from compileflow.contracts import FileRecord
from compileflow.errors import StoreUnavailableError
from compileflow.stores.layout import blob_key
from compileflow.stores.s3.errors import code_of, s3_errors, status_of
from compileflow.stores.s3.objects import S3Object, S3Objects, expecting, is_conflict

_ATTEMPTS = 4
_APPEARS_WITHIN_S = (0.0, 0.2, 0.8)

# Sends a blob: called with the boto3 arguments of its place and of the condition.
SendBlob = Callable[[dict[str, str], dict[str, str]], None]


def write_blob_once(
    objects: S3Objects, record: FileRecord, existing_object: S3Object | None, send: SendBlob
) -> None:
    """Send a blob unless another request, by this process or another, has already written it.

    Args:
        objects: Objects of the store.
        record: Size and SHA-256 of the blob.
        existing_object: Object with other bytes at the blob's place, which is replaced; None if there is none.
        send: Sends the blob.

    Raises:
        StoreError: The server refused.
        StoreUnavailableError: The server did not answer, or other writers were faster every time.
    """
    for _ in range(_ATTEMPTS):
        if _try_write(objects, record, existing_object, send):
            return
        replaced_object, existing_object = existing_object, objects.head(blob_key(record.sha256))
        if _is_blob(existing_object, record, replaced_object):
            return
    raise StoreUnavailableError(
        f"{objects.uri}: {record.path} was refused {_ATTEMPTS} times, because other writers were faster.",
        hint="Try again later.",
    )


def _try_write(objects: S3Objects, record: FileRecord, existing_object: S3Object | None, send: SendBlob) -> bool:
    from botocore.exceptions import ClientError

    with s3_errors(objects.uri, "write to"):
        try:
            send(
                objects.place(blob_key(record.sha256)),
                expecting(existing_object.etag if existing_object else None),
            )
        except ClientError as error:
            if is_conflict(error) or code_of(error) == "NoSuchUpload":
                return False
            if status_of(error) < 500 or not _appears(objects, record, existing_object):
                raise
    return True


def _is_blob(stored_object: S3Object | None, record: FileRecord, replaced_object: S3Object | None) -> bool:
    """Say whether an object has the blob's size, and is not the altered one that was to be replaced."""
    return (
        stored_object is not None
        and stored_object.size_bytes == record.size_bytes
        and (replaced_object is None or stored_object.etag != replaced_object.etag)
    )


def _appears(objects: S3Objects, record: FileRecord, replaced_object: S3Object | None) -> bool:
    """Say whether a blob exists despite a 5xx error. Some servers fail while another request completes it."""
    for pause_s in _APPEARS_WITHIN_S:
        time.sleep(pause_s)
        if _is_blob(objects.head(blob_key(record.sha256)), record, replaced_object):
            return True
    return False


def write_if_unchanged_or_ours(
    objects: S3Objects, key: str, body: bytes, *, etag: str | None, is_ours: Callable[[bytes], bool]
) -> str | None:
    """Write a small object if it is unchanged, and return the ETag of the object that is ours; else None.

    Args:
        objects: Objects of the store.
        key: Key of the object.
        body: New content.
        etag: ETag of the object that is to be replaced; None if none is expected.
        is_ours: Says whether the content was written by this writer.
    """
    new_etag = objects.write_if(key, body, etag=etag)
    if new_etag is not None:
        return new_etag
    content = objects.read(key)
    return content[1].etag if content is not None and is_ours(content[0]) else None
