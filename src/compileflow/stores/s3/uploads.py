"""Blobs on their way up: one PUT up to 64 MiB, resumable parts above. Sent under the name of what was really sent.

Whatever is sent was hashed in memory a moment before, so that a file which changes meanwhile is never stored under
the digest it had before.
"""

from __future__ import annotations

import hashlib
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from compileflow.contracts import FileRecord
from compileflow.errors import StoreUnavailableError
from compileflow.stores.layout import blob_key, changed_while_stored
from compileflow.stores.s3.client import code_of, object_arguments, s3_errors, status_of
from compileflow.stores.s3.objects import CONFLICTS, Found, S3Objects

SINGLE_BYTES = 64 * 2**20
PART_BYTES = 16 * 2**20
# S3 takes 10,000 parts.
_MOST_PARTS = 9000
_PARTS_AT_ONCE = 4
_MEMORY_BYTES = 192 * 2**20
_TRIES = 4
_APPEARS_WITHIN_S = (0.0, 0.2, 0.8)


class BlobUploads:
    """Sends blobs; what it holds in memory is bounded, however many files are sent at once."""

    def __init__(self, objects: S3Objects, *, single_bytes: int = SINGLE_BYTES, part_bytes: int = PART_BYTES):
        self._objects = objects
        self.single_bytes = single_bytes
        self._part_bytes = part_bytes
        self._memory = _Memory(_MEMORY_BYTES)

    @contextmanager
    def read(self, path: Path) -> Iterator[tuple[bytes, str]]:
        """Give a file's bytes and their SHA-256, once there is memory for them."""
        with self._memory.held(path.stat().st_size):
            body = path.read_bytes()
            yield body, hashlib.sha256(body).hexdigest()

    def put_file(
        self, path: Path, record: FileRecord, there: Found | None, on_bytes: Callable[[int], None]
    ) -> None:
        """Send a file in parts, from the disk.

        Args:
            path: The file.
            record: Its size and SHA-256.
            there: What is at the blob's place: an object of another size, which is replaced, or None.
            on_bytes: Told what was sent or found to be there already, in bytes.

        Raises:
            StoreError: refused, or the file changed.
            StoreUnavailableError: no answer; parts that arrived stay, and the next put goes on after them.
        """
        self._put(
            record, there, lambda place, condition: self._multipart(path, record, place, condition, on_bytes)
        )

    def put_body(
        self, body: bytes, record: FileRecord, there: Found | None, on_bytes: Callable[[int], None]
    ) -> None:
        """Send bytes that are in memory with one request; arguments and errors are those of `put_file`."""
        arguments = object_arguments(self._objects.settings, blob=True)
        checksum = b64encode(bytes.fromhex(record.sha256)).decode()

        def send(place: dict[str, str], condition: dict[str, str]) -> None:
            self._objects.client.put_object(Body=body, ChecksumSHA256=checksum, **place, **condition, **arguments)
            on_bytes(len(body))

        self._put(record, there, send)

    def _put(
        self, record: FileRecord, there: Found | None, send: Callable[[dict[str, str], dict[str, str]], None]
    ) -> None:
        for _ in range(_TRIES):
            if self._try(record, there, send):
                return
            # Somebody else was faster, or our own earlier request was, whose reply was lost.
            there = self._objects.head(blob_key(record.sha256))
            if there is not None and there.size_bytes == record.size_bytes:
                return
        raise StoreUnavailableError(
            f"{self._objects.uri}: {record.path} was refused {_TRIES} times as being written by others.",
            hint="Try again later.",
        )

    def _try(
        self, record: FileRecord, there: Found | None, send: Callable[[dict[str, str], dict[str, str]], None]
    ) -> bool:
        from botocore.exceptions import ClientError

        condition = {"IfMatch": there.etag} if there is not None else {"IfNoneMatch": "*"}
        with s3_errors(self._objects.uri, "write to"):
            try:
                send(self._objects.place(blob_key(record.sha256)), condition)
            except ClientError as error:
                if status_of(error) in CONFLICTS or code_of(error) in ("NoSuchUpload", "NoSuchKey"):
                    return False
                if status_of(error) < 500 or not self._appears(record):
                    raise
        return True

    def _appears(self, record: FileRecord) -> bool:
        """Say whether a blob is there all the same: some servers break while another completes the same upload."""
        for pause_s in _APPEARS_WITHIN_S:
            time.sleep(pause_s)
            there = self._objects.head(blob_key(record.sha256))
            if there is not None and there.size_bytes == record.size_bytes:
                return True
        return False

    def _multipart(
        self,
        path: Path,
        record: FileRecord,
        place: dict[str, str],
        condition: dict[str, str],
        on_bytes: Callable[[int], None],
    ) -> None:
        from botocore.exceptions import ClientError

        client = self._objects.client
        upload = place | {"UploadId": self._unfinished(place)}
        size = max(self._part_bytes, -(-record.size_bytes // _MOST_PARTS))
        parts, sha256 = self._send_parts(path, size, upload, on_bytes)
        if sha256 != record.sha256:
            client.abort_multipart_upload(**upload)
            raise changed_while_stored(path)
        try:
            client.complete_multipart_upload(MultipartUpload={"Parts": parts}, **upload, **condition)
        except ClientError as error:
            if status_of(error) in CONFLICTS:
                with suppress(ClientError):
                    client.abort_multipart_upload(**upload)
            raise

    def _send_parts(
        self, path: Path, size: int, upload: dict[str, str], on_bytes: Callable[[int], None]
    ) -> tuple[list[dict[str, Any]], str]:
        """Send what the server lacks; return all parts and the SHA-256 of what they hold together."""
        have = self._parts(upload)
        # Hashed in order while it is read, though the parts leave in any order.
        whole = hashlib.sha256()
        sent: list[Future[dict[str, Any]]] = []
        pool = ThreadPoolExecutor(_PARTS_AT_ONCE)
        failed = threading.Event()

        def send(number: int, data: bytes) -> dict[str, Any]:
            try:
                checksum = b64encode(hashlib.sha256(data).digest()).decode()
                part = have.get(number)
                if part is None or not _same(part, data, checksum):
                    part = self._objects.client.upload_part(
                        Body=data, PartNumber=number, ChecksumSHA256=checksum, **upload
                    )
                on_bytes(len(data))
                return {"PartNumber": number, "ETag": part["ETag"], "ChecksumSHA256": checksum}
            except BaseException:
                failed.set()
                raise
            finally:
                self._memory.release(size)

        try:
            with path.open("rb") as stream:
                while not failed.is_set():
                    self._memory.acquire(size)
                    data = stream.read(size)
                    if not data:
                        self._memory.release(size)
                        break
                    whole.update(data)
                    sent.append(pool.submit(send, len(sent) + 1, data))
            return [future.result() for future in sent], whole.hexdigest()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            for future in sent:
                if future.cancelled():
                    self._memory.release(size)

    def _unfinished(self, place: dict[str, str]) -> str:
        """Return the upload that an earlier put of the same blob left, or a new one."""
        client = self._objects.client
        there = client.list_multipart_uploads(Bucket=place["Bucket"], Prefix=place["Key"]).get("Uploads", ())
        same = [upload["UploadId"] for upload in there if upload["Key"] == place["Key"]]
        if same:
            return str(same[-1])
        arguments = object_arguments(self._objects.settings, blob=True)
        return str(client.create_multipart_upload(ChecksumAlgorithm="SHA256", **place, **arguments)["UploadId"])

    def _parts(self, upload: dict[str, str]) -> dict[int, dict[str, Any]]:
        pages = self._objects.client.get_paginator("list_parts").paginate(**upload)
        return {part["PartNumber"]: part for page in pages for part in page.get("Parts", ())}


def _same(part: dict[str, Any], data: bytes, checksum: str) -> bool:
    """Say whether a part that the server has holds these bytes; without SHA-256 its ETag is an MD5."""
    if part["Size"] != len(data):
        return False
    if "ChecksumSHA256" in part:
        return bool(part["ChecksumSHA256"] == checksum)
    return bool(part["ETag"].strip('"') == hashlib.md5(data, usedforsecurity=False).hexdigest())


class _Memory:
    """Lets as many bytes be held as there may be; what is larger than all of it, alone."""

    def __init__(self, limit_bytes: int):
        self._limit = limit_bytes
        self._held = 0
        self._changed = threading.Condition()

    def acquire(self, size_bytes: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._held == 0 or self._held + size_bytes <= self._limit)
            self._held += size_bytes

    def release(self, size_bytes: int) -> None:
        with self._changed:
            self._held -= size_bytes
            self._changed.notify_all()

    @contextmanager
    def held(self, size_bytes: int) -> Iterator[None]:
        self.acquire(size_bytes)
        try:
            yield
        finally:
            self.release(size_bytes)
