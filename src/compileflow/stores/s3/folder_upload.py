"""FolderUpload: send the blobs of a folder that the store lacks, several at once.

Small files are read once, hashed and sent from memory. Large files are hashed first and then sent in parts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from compileflow.contracts import FileRecord
from compileflow.contracts.digests import file_digest, list_files
from compileflow.stores import layout
from compileflow.stores.collecting import REFRESH_AFTER_S
from compileflow.stores.s3.blob_uploads import BlobUploads
from compileflow.stores.s3.objects import S3Object, S3Objects
from compileflow.stores.s3.progress import TransferProgress
from compileflow.stores.threads import run_for_all

# From this number of blobs on, one listing of a small store costs less than one request per blob.
_LIST_FROM = 8


class FolderUpload:
    """One put of one folder."""

    def __init__(self, folder: Path, objects: S3Objects, uploads: BlobUploads, *, at_once: int):
        self._folder = folder
        self._objects = objects
        self._uploads = uploads
        self._at_once = at_once
        self._listed: dict[str, S3Object] | None = None
        self._claimed: set[str] = set()
        self._lock = threading.Lock()
        self.refreshed = 0

    def send(self) -> tuple[FileRecord, ...]:
        """Send the blobs that the store lacks, and return all files. `refreshed` counts the old blobs found.

        Raises:
            StoreError: The server refused, or a file changed meanwhile.
            StoreUnavailableError: The server did not answer. The next put sends only what is missing.
        """
        stamps = _stamps(self._folder)
        if len(stamps) >= _LIST_FROM:
            self._listed = listed_blobs(self._objects)
        with TransferProgress("storing", sum(size for size, _ in stamps.values())) as progress:

            def send_small(path: Path) -> str:
                if path.stat().st_size > self._uploads.single_bytes:
                    return file_digest(path)
                with self._uploads.read(path) as (body, sha256):
                    record = FileRecord(path=path.name, size_bytes=len(body), sha256=sha256)
                    self._send(record, body, progress.add, partial(self._uploads.put_body, body))
                return sha256

            def send_large(record: FileRecord) -> None:
                path = self._folder / record.path
                self._send(record, path, progress.add, partial(self._uploads.put_file, path))

            files = list_files(self._folder, at_once=self._at_once, digest_of=send_small)
            large_files = [record for record in files if record.size_bytes > self._uploads.single_bytes]
            run_for_all(send_large, largest_first(large_files), at_once=self._at_once)
        for path, stamp in _stamps(self._folder).items():
            if stamps.get(path) != stamp:
                raise layout.changed_while_stored(path)
        return files

    def _send(
        self,
        record: FileRecord,
        content: bytes | Path,
        on_bytes: Callable[[int], None],
        send: Callable[[FileRecord, S3Object | None, Callable[[int], None]], None],
    ) -> None:
        """Send a blob that the store lacks or holds altered; refresh an old one (stores/collecting.py)."""
        with self._lock:
            # Several files may hold the same bytes.
            if record.sha256 in self._claimed:
                return
            self._claimed.add(record.sha256)
        key = layout.blob_key(record.sha256)
        existing_object = self._listed.get(key) if self._listed is not None else self._objects.head(key)
        if (
            existing_object is not None
            and existing_object.size_bytes == record.size_bytes
            and self._uploads.holds(record, existing_object, content)
        ):
            if existing_object.age_s < REFRESH_AFTER_S:
                on_bytes(record.size_bytes)
                return
            if self._objects.refresh(existing_object, blob=True):
                with self._lock:
                    self.refreshed += 1
                on_bytes(record.size_bytes)
                return
            existing_object = None
        send(record, existing_object, on_bytes)


def listed_blobs(objects: S3Objects) -> dict[str, S3Object] | None:
    """Return all blobs of a store by key; None if one request cannot list them all."""
    page, next_token = objects.page(layout.BLOBS)
    return {blob.key: blob for blob in page} if next_token is None else None


def find_blobs(objects: S3Objects, blobs: Sequence[FileRecord], *, at_once: int) -> dict[str, S3Object | None]:
    """Return the existing object of each blob by SHA-256, whatever its size; None where there is none."""
    objects_by_key = listed_blobs(objects) if len(blobs) >= _LIST_FROM else None
    if objects_by_key is not None:
        return {record.sha256: objects_by_key.get(layout.blob_key(record.sha256)) for record in blobs}
    heads = run_for_all(lambda record: objects.head(layout.blob_key(record.sha256)), blobs, at_once=at_once)
    return dict(zip((record.sha256 for record in blobs), heads, strict=True))


def largest_first(files: Sequence[FileRecord]) -> Sequence[FileRecord]:
    """Sort files for a parallel transfer. A large file that starts last would delay the end."""
    return sorted(files, key=lambda record: -record.size_bytes)


def _stamps(folder: Path) -> dict[Path, tuple[int, tuple[int, int]]]:
    """Return size, time and inode of every file. One of them changes when a file is written to or replaced."""
    stats = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {path: (stat.st_size, (stat.st_mtime_ns, stat.st_ino)) for path, stat in stats.items()}
