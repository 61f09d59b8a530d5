"""A folder on its way up: a small file is read once, hashed and sent from memory; a large one is hashed first."""

from __future__ import annotations

import threading
from collections.abc import Callable, MutableSequence, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from compileflow.contracts import FileRecord
from compileflow.contracts.digests import file_digest, list_files
from compileflow.stores import layout
from compileflow.stores.collecting import REFRESH_AFTER_S
from compileflow.stores.s3.objects import Found, S3Objects
from compileflow.stores.s3.progress import TransferProgress
from compileflow.stores.s3.uploads import BlobUploads

# From so many blobs on, one listing of a small store costs less than asking for each.
_LIST_FROM = 8

Item = TypeVar("Item")
Result = TypeVar("Result")


class FolderUpload:
    """One put of one folder."""

    def __init__(self, folder: Path, objects: S3Objects, uploads: BlobUploads, *, at_once: int):
        self._folder = folder
        self._objects = objects
        self._uploads = uploads
        self._at_once = at_once
        self._listed: dict[str, Found] | None = None
        self._claimed: set[str] = set()
        self._claiming = threading.Lock()
        self.refreshed = 0

    def send(self) -> tuple[FileRecord, ...]:
        """Send what the store lacks and return all files; `refreshed` then counts the old blobs that were found.

        Raises:
            StoreError: refused, or a file changed meanwhile.
            StoreUnavailableError: no answer; the next put sends only what is missing.
        """
        before = _stamps(self._folder)
        if len(before) >= _LIST_FROM:
            self._listed = listed_blobs(self._objects)
        with TransferProgress("storing", sum(size for size, _ in before.values())) as progress:

            def send_small(path: Path) -> str:
                if path.stat().st_size > self._uploads.single_bytes:
                    return file_digest(path)
                with self._uploads.read(path) as (body, sha256):
                    record = FileRecord(path=path.name, size_bytes=len(body), sha256=sha256)
                    self._send(record, progress.add, partial(self._uploads.put_body, body))
                return sha256

            def send_large(record: FileRecord) -> None:
                self._send(record, progress.add, partial(self._uploads.put_file, self._folder / record.path))

            files = list_files(self._folder, at_once=self._at_once, digest_of=send_small)
            large = [record for record in files if record.size_bytes > self._uploads.single_bytes]
            each(send_large, sorted(large, key=lambda one: -one.size_bytes), at_once=self._at_once)
        for path, stamp in _stamps(self._folder).items():
            if before.get(path) != stamp:
                raise layout.changed_while_stored(path)
        return files

    def _send(
        self,
        record: FileRecord,
        on_bytes: Callable[[int], None],
        send: Callable[[FileRecord, Found | None, Callable[[int], None]], None],
    ) -> None:
        """Send a blob that the store lacks; make an old one young, as stores/collecting.py explains."""
        with self._claiming:
            # Several files may hold the same bytes.
            if record.sha256 in self._claimed:
                return
            self._claimed.add(record.sha256)
        key = layout.blob_key(record.sha256)
        there = self._listed.get(key) if self._listed is not None else self._objects.head(key)
        if there is not None and there.size_bytes == record.size_bytes:
            if there.age_s < REFRESH_AFTER_S:
                on_bytes(record.size_bytes)
                return
            if self._objects.refresh(there, blob=True):
                with self._claiming:
                    self.refreshed += 1
                on_bytes(record.size_bytes)
                return
            there = None
        send(record, there, on_bytes)


def listed_blobs(objects: S3Objects) -> dict[str, Found] | None:
    """Return all blobs of a store by key, or None of one that is too large for one request."""
    page, following = objects.page(layout.BLOBS)
    return {found.key: found for found in page} if following is None else None


def find_blobs(objects: S3Objects, blobs: Sequence[FileRecord], *, at_once: int) -> dict[str, Found | None]:
    """Look which blobs are there, whatever their size, by SHA-256."""
    listed = listed_blobs(objects) if len(blobs) >= _LIST_FROM else None
    if listed is not None:
        return {record.sha256: listed.get(layout.blob_key(record.sha256)) for record in blobs}
    found = each(lambda record: objects.head(layout.blob_key(record.sha256)), blobs, at_once=at_once)
    return dict(zip((record.sha256 for record in blobs), found, strict=True))


def each(work: Callable[[Item], Result], items: Sequence[Item], *, at_once: int) -> MutableSequence[Result]:
    """Do it for all, several at once; after an error nothing new is begun."""
    pool = ThreadPoolExecutor(at_once)
    try:
        return [*pool.map(work, items)]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _stamps(folder: Path) -> dict[Path, tuple[int, tuple[int, int]]]:
    """Return what changes when a file is written to: its size, and its time and identity."""
    found = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {path: (stat.st_size, (stat.st_mtime_ns, stat.st_ino)) for path, stat in found.items()}
