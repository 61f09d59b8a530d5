"""BlobUploads: send blobs to S3, with one PUT up to 64 MiB, in resumable parts above.

The bytes that are sent are hashed in memory, so that a file which changes meanwhile is never stored under the
digest that it had before.
"""

from __future__ import annotations

import hashlib
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from compileflow.contracts import FileRecord
from compileflow.stores.layout import changed_while_stored
from compileflow.stores.s3.blob_checks import holds_blob
from compileflow.stores.s3.client import object_arguments
from compileflow.stores.s3.errors import code_of
from compileflow.stores.s3.lost_replies import write_blob_once
from compileflow.stores.s3.objects import S3Object, S3Objects, is_conflict

SINGLE_BYTES = 64 * 2**20
PART_BYTES = 16 * 2**20
# S3 allows 10,000 parts.
_MAX_PARTS = 9000
_PARTS_AT_ONCE = 4
_MEMORY_BYTES = 192 * 2**20


class BlobUploads:
    """Sends blobs. The memory for their bytes is limited, however many files are sent at once."""

    def __init__(self, objects: S3Objects, *, single_bytes: int = SINGLE_BYTES, part_bytes: int = PART_BYTES):
        self._objects = objects
        self.single_bytes = single_bytes
        self._part_bytes = part_bytes
        self._memory = _MemoryBudget(_MEMORY_BYTES)

    @contextmanager
    def read(self, path: Path) -> Iterator[tuple[bytes, str]]:
        """Give the bytes of a file and their SHA-256, once there is memory for them."""
        with self._memory.reserved(path.stat().st_size):
            body = path.read_bytes()
            yield body, hashlib.sha256(body).hexdigest()

    def holds(self, record: FileRecord, existing_object: S3Object, content: bytes | Path) -> bool:
        """Say whether an object of a blob's size has its bytes, which are given, or those of the given file."""
        return holds_blob(self._objects, record, existing_object, content, part_bytes=self._part_bytes_for(record))

    def put_file(
        self, path: Path, record: FileRecord, existing_object: S3Object | None, on_bytes: Callable[[int], None]
    ) -> None:
        """Send a file from the disk in parts.

        Args:
            path: Path of the file.
            record: Size and SHA-256 of the file.
            existing_object: Object with other bytes at the blob's place, which is replaced; None if there is none.
            on_bytes: Called with the number of bytes that were sent or found on the server.

        Raises:
            StoreError: The server refused, or the file changed.
            StoreUnavailableError: The server did not answer. Parts that arrived stay, and the next put resumes.
        """
        write_blob_once(
            self._objects,
            record,
            existing_object,
            lambda place, condition: self._send_file(path, record, place, condition, on_bytes),
        )

    def put_body(
        self, body: bytes, record: FileRecord, existing_object: S3Object | None, on_bytes: Callable[[int], None]
    ) -> None:
        """Send bytes from memory with one request. Other arguments and errors are those of `put_file`."""
        arguments = object_arguments(self._objects.settings, blob=True)
        checksum = b64encode(bytes.fromhex(record.sha256)).decode()

        def send(place: dict[str, str], condition: dict[str, str]) -> None:
            self._objects.client.put_object(Body=body, ChecksumSHA256=checksum, **place, **condition, **arguments)
            on_bytes(len(body))

        write_blob_once(self._objects, record, existing_object, send)

    def _send_file(
        self,
        path: Path,
        record: FileRecord,
        place: dict[str, str],
        condition: dict[str, str],
        on_bytes: Callable[[int], None],
    ) -> None:
        from botocore.exceptions import ClientError

        client = self._objects.client
        upload = place | {"UploadId": self._resumable_upload(place)}
        parts, sha256 = self._send_parts(path, self._part_bytes_for(record), upload, on_bytes)
        if sha256 != record.sha256:
            client.abort_multipart_upload(**upload)
            raise changed_while_stored(path)
        try:
            client.complete_multipart_upload(MultipartUpload={"Parts": parts}, **upload, **condition)
        except ClientError as error:
            # After NoSuchKey, the next attempt expects no object and can use the same parts.
            if is_conflict(error) and code_of(error) != "NoSuchKey":
                with suppress(ClientError):
                    client.abort_multipart_upload(**upload)
            raise

    def _send_parts(
        self, path: Path, part_bytes: int, upload: dict[str, str], on_bytes: Callable[[int], None]
    ) -> tuple[list[dict[str, Any]], str]:
        """Send the parts that the server lacks. Return all parts, and the SHA-256 of the whole file."""
        arrived_parts = self._arrived_parts(upload)
        # The file is read and hashed in order, although the parts leave in any order.
        file_hash = hashlib.sha256()
        futures: list[Future[dict[str, Any]]] = []
        pool = ThreadPoolExecutor(_PARTS_AT_ONCE)
        failure = threading.Event()

        def send(number: int, data: bytes) -> dict[str, Any]:
            try:
                checksum = b64encode(hashlib.sha256(data).digest()).decode()
                part = arrived_parts.get(number)
                if part is None or not _holds(part, data, checksum):
                    part = self._objects.client.upload_part(
                        Body=data, PartNumber=number, ChecksumSHA256=checksum, **upload
                    )
                on_bytes(len(data))
                return {"PartNumber": number, "ETag": part["ETag"], "ChecksumSHA256": checksum}
            except BaseException:
                failure.set()
                raise
            finally:
                self._memory.release(part_bytes)

        try:
            with path.open("rb") as stream:
                while not failure.is_set():
                    self._memory.acquire(part_bytes)
                    data = stream.read(part_bytes)
                    if not data:
                        self._memory.release(part_bytes)
                        break
                    file_hash.update(data)
                    futures.append(pool.submit(send, len(futures) + 1, data))
            return [future.result() for future in futures], file_hash.hexdigest()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            for future in futures:
                if future.cancelled():
                    self._memory.release(part_bytes)

    def _part_bytes_for(self, record: FileRecord) -> int:
        return max(self._part_bytes, -(-record.size_bytes // _MAX_PARTS))

    def _resumable_upload(self, place: dict[str, str]) -> str:
        """Return the id of the upload that an earlier put of the same blob left unfinished, or of a new one."""
        client = self._objects.client
        uploads = client.list_multipart_uploads(Bucket=place["Bucket"], Prefix=place["Key"]).get("Uploads", ())
        ids = [upload["UploadId"] for upload in uploads if upload["Key"] == place["Key"]]
        if ids:
            return str(ids[-1])
        arguments = object_arguments(self._objects.settings, blob=True)
        return str(client.create_multipart_upload(ChecksumAlgorithm="SHA256", **place, **arguments)["UploadId"])

    def _arrived_parts(self, upload: dict[str, str]) -> dict[int, dict[str, Any]]:
        pages = self._objects.client.get_paginator("list_parts").paginate(**upload)
        return {part["PartNumber"]: part for page in pages for part in page.get("Parts", ())}


def _holds(part: dict[str, Any], data: bytes, checksum: str) -> bool:
    """Say whether a part on the server holds these bytes. A part without a SHA-256 has an MD5 as its ETag."""
    if part["Size"] != len(data):
        return False
    if "ChecksumSHA256" in part:
        return bool(part["ChecksumSHA256"] == checksum)
    return bool(part["ETag"].strip('"') == hashlib.md5(data, usedforsecurity=False).hexdigest())


class _MemoryBudget:
    """Limits the bytes that threads hold at once. A request above the limit waits until it is alone."""

    def __init__(self, limit_bytes: int):
        self._limit = limit_bytes
        self._reserved = 0
        self._changed = threading.Condition()

    def acquire(self, size_bytes: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._reserved == 0 or self._reserved + size_bytes <= self._limit)
            self._reserved += size_bytes

    def release(self, size_bytes: int) -> None:
        with self._changed:
            self._reserved -= size_bytes
            self._changed.notify_all()

    @contextmanager
    def reserved(self, size_bytes: int) -> Iterator[None]:
        self.acquire(size_bytes)
        try:
            yield
        finally:
            self.release(size_bytes)
