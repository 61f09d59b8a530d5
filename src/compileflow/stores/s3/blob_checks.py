"""Compare a blob on the server with the right bytes, mostly by the checksums that the server keeps."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from io import BytesIO
from pathlib import Path

from compileflow.contracts import FileRecord
from compileflow.errors import IntegrityError
from compileflow.stores.s3.blob_downloads import stored_digest
from compileflow.stores.s3.objects import S3Object, S3Objects


def holds_blob(
    objects: S3Objects, record: FileRecord, existing_object: S3Object, content: bytes | Path, *, part_bytes: int
) -> bool:
    """Say whether an object of a blob's size has its bytes.

    The ETag is an MD5, unless the object is encrypted with KMS. Then the server's SHA-256 tells. An object without
    either is downloaded.

    Args:
        objects: Objects of the store.
        record: Size and SHA-256 of the blob.
        existing_object: Object at the blob's place.
        content: The right bytes, or the path of a file with them.
        part_bytes: Size of the parts in which such a blob is sent.
    """
    etag = existing_object.etag.strip('"')
    is_in_parts = "-" in etag
    if etag == _checksum("md5", content, part_bytes if is_in_parts else None, hexadecimal=True):
        return True
    checksum = objects.sha256_checksum(existing_object.key)
    if checksum is not None and checksum == _checksum("sha256", content, part_bytes if "-" in checksum else None):
        return True
    if checksum is not None and not is_in_parts:
        return False
    try:
        return stored_digest(objects, record) == record.sha256
    except IntegrityError:
        return False


def _checksum(algorithm: str, content: bytes | Path, part_bytes: int | None, *, hexadecimal: bool = False) -> str:
    """Return the checksum that S3 gives an object that was sent whole, or in parts of `part_bytes`."""
    with BytesIO(content) if isinstance(content, bytes) else content.open("rb") as stream:
        if part_bytes is None:
            digest, suffix = (
                hashlib.file_digest(stream, lambda: hashlib.new(algorithm, usedforsecurity=False)).digest(),
                "",
            )
        else:
            parts = iter(lambda: stream.read(part_bytes), b"")
            digests = [hashlib.new(algorithm, part, usedforsecurity=False).digest() for part in parts]
            digest, suffix = (
                hashlib.new(algorithm, b"".join(digests), usedforsecurity=False).digest(),
                f"-{len(digests)}",
            )
    return (digest.hex() if hexadecimal else b64encode(digest).decode()) + suffix
