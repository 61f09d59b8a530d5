"""LocalStore, file://: an artifact store in a folder of this machine, in the layout that all stores share.

Beside the shared layout, tmp/ holds unfinished work and locks/ holds lock files.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from stat import S_ISREG
from urllib.parse import urlparse

from pydantic import JsonValue

from compileflow._process.folders import (
    check_writable,
    file_lock,
    file_written_whole,
    link_or_copy,
    os_errors,
    path_of_uri,
    sweep,
    work_folder,
)
from compileflow.contracts import Collected, FileRecord, StoredFolder
from compileflow.contracts.digests import file_digest, folder_digest, list_files, listing_bytes
from compileflow.errors import IntegrityError, SpecError
from compileflow.settings import Settings
from compileflow.stores import layout
from compileflow.stores.collecting import REFRESH_AFTER_S, AgedObject, collect

# Attempts of a put. A collection may delete what an attempt found in the store.
_PUT_ATTEMPTS = 5
# A store may be on a network file system, which answers several requests at once.
_READS_AT_ONCE = 8


class LocalStore:
    """Folders as content-addressed blobs below one folder of this machine."""

    def __init__(self, uri: str, settings: Settings):
        """Keep the folder's path, and that of the work folder for reading a store that cannot be written."""
        url = urlparse(uri)
        if url.scheme != "file" or url.netloc not in ("", "localhost") or not url.path:
            raise SpecError(
                f"{uri!r} is not the URI of a local folder.", hint="Write it as file:///absolute/path."
            )
        self.uri = uri.rstrip("/")
        self.root = path_of_uri(uri)
        self._work_dir = settings.work_dir

    def put_folder(self, folder: Path) -> StoredFolder:
        """Copy the blobs that the store lacks, then write the listing.

        Raises:
            StoreError: The store cannot be written, or the folder changed during the copy.
        """
        with os_errors(folder, "read"):
            files = list_files(folder)
        digest = folder_digest(files)
        with os_errors(self.root, "write to the store"), work_folder(self.root / "tmp", label="put") as work:
            for _ in range(_PUT_ATTEMPTS):
                refreshes = [
                    self._put_blob(folder / record.path, record, work / str(number))
                    for number, record in enumerate(files)
                ]
                refreshes.append(self._put_listing(listing_bytes(files), digest, work / "listing"))
                # Rule 4 of stores/collecting.py.
                if not any(refreshes) or self.exists(digest):
                    break
            else:
                raise layout.collected_meanwhile(self.uri, folder)
        return StoredFolder(self.folder_uri(digest), digest, sum(record.size_bytes for record in files))

    def get_folder(self, digest: str, dest: Path) -> tuple[FileRecord, ...]:
        """Copy a folder out of the store and check every SHA-256.

        Raises:
            IntegrityError: The store does not hold the folder, or a blob is missing or altered.
            StoreError: `dest` exists or cannot be written.
        """
        return self._write_out(digest, dest, link=False)

    @contextmanager
    def open_folder(self, digest: str) -> Iterator[Path]:
        """Give a verified copy, which consists of hard links where possible. Do not write to it."""
        with work_folder(self._read_dir(), label="read") as work:
            self._write_out(digest, work / "folder", link=True)
            yield work / "folder"

    def exists(self, digest: str) -> bool:
        """Say whether the listing and every blob, with the right size, are in the store."""
        try:
            files = self._listing(digest)
        except IntegrityError:
            return False
        return all(self._has_blob(record) for record in files)

    def list(self) -> Iterator[str]:
        """Yield the digests of all folders, sorted."""
        return self._json_names(layout.LISTINGS)

    def folder_uri(self, digest: str) -> str:
        """Return the URI of the folder's listing."""
        return f"{self.uri}/{layout.LISTINGS}{digest}.json"

    def put_record(self, kind: str, key: str, value: Mapping[str, JsonValue]) -> None:
        """Write a record atomically: readers see the old value or the new one."""
        path = self.root / layout.record_key(kind, key)
        with (
            os_errors(self.root, "write to the store"),
            work_folder(self.root / "tmp", label="record") as work,
            _stored_file(path, work / "record") as partial,
        ):
            partial.write_bytes(layout.record_body(dict(value)))

    def get_record(self, kind: str, key: str) -> dict[str, JsonValue] | None:
        """Return the value of a record; None if it is missing or not JSON."""
        body = self._read(self.root / layout.record_key(kind, key))
        return layout.parse_record(body) if body is not None else None

    def list_records(self, kind: str) -> Iterator[str]:
        """Yield the keys of all records of a kind, sorted."""
        return self._json_names(layout.records_key(kind))

    def lock(self, key: str, *, on_wait: Callable[[], None]) -> AbstractContextManager[None]:
        """Hold a lock that excludes all other processes on this machine that use this folder."""
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        return file_lock(self.root / "locks" / f"{name}.lock", on_wait=on_wait)

    def gc(
        self,
        keep: Collection[str],
        *,
        min_age_s: float,
        dry_run: bool = False,
        may_lack: Collection[str] = (),
        at_most: float = 1.0,
    ) -> Collected:
        """Delete unneeded folders and blobs, as stores/collecting.py explains.

        Raises:
            IntegrityError: A listing cannot be read. Nothing was deleted.
            StoreError: The store does not exist, cannot be written, or does not list a folder of `keep`. Or more
                than `at_most` would be deleted.
        """
        with os_errors(self.root, "collect garbage in"):
            if not self.root.is_dir():
                raise layout.no_store(self.uri)
            if not dry_run:
                # Killed processes leave work folders.
                sweep(self.root / "tmp")
            return collect(
                self,
                keep,
                min_age_s=min_age_s,
                dry_run=dry_run,
                may_lack=may_lack,
                at_most=at_most,
                at_once=_READS_AT_ONCE,
            )

    def aged_listings(self) -> Iterator[AgedObject]:
        """Yield all listings."""
        return _aged(_entries(self.root / layout.LISTINGS))

    def aged_blobs(self) -> Iterator[AgedObject]:
        """Yield all blobs."""
        return _aged(path for prefix in _entries(self.root / layout.BLOBS) for path in _entries(prefix))

    def read_listing(self, digest: str) -> tuple[FileRecord, ...] | None:
        """Return the files of a folder; None if its listing does not exist."""
        path = self.root / layout.listing_key(digest)
        body = self._read(path)
        return layout.parse_listing(body, digest, str(path)) if body is not None else None

    def delete_listing(self, digest: str, *, min_age_s: float) -> bool:
        """Delete a listing if it is still at least that old."""
        return _delete_if_old(self.root / layout.listing_key(digest), min_age_s)

    def delete_blob(self, sha256: str, *, min_age_s: float) -> bool:
        """Delete a blob if it is still at least that old."""
        return _delete_if_old(self._blob_path(sha256), min_age_s)

    def _json_names(self, prefix: str) -> Iterator[str]:
        with os_errors(self.root, "read the store"):
            paths = _entries(self.root / prefix)
        for path in paths:
            if path.suffix == ".json":
                yield path.stem

    def _read(self, path: Path) -> bytes | None:
        with os_errors(path, "read"):
            try:
                return path.read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def _put_blob(self, path: Path, record: FileRecord, partial: Path) -> bool:
        """Copy a file into the store unless it is there, unaltered. Return whether an old blob was refreshed."""
        blob = self._blob_path(record.sha256)
        if self._has_right_blob(record) and (was_refreshed := _refresh_if_old(blob)) is not None:
            return was_refreshed
        with _stored_file(blob, partial):
            shutil.copyfile(path, partial)
            if file_digest(partial) != record.sha256:
                raise layout.changed_while_stored(path)
        return False

    def _put_listing(self, body: bytes, digest: str, partial: Path) -> bool:
        """Write a listing unless it is there, unaltered. Return whether an old listing was refreshed."""
        path = self.root / layout.listing_key(digest)
        if self._read(path) == body and (was_refreshed := _refresh_if_old(path)) is not None:
            return was_refreshed
        with _stored_file(path, partial):
            partial.write_bytes(body)
        return False

    def _write_out(self, digest: str, dest: Path, *, link: bool) -> tuple[FileRecord, ...]:
        files = self._listing(digest)
        with os_errors(dest, "write to"):
            dest.mkdir(parents=True)
            try:
                for record in files:
                    self._write_file(record, dest / record.path, link=link)
            except BaseException:
                # A partial folder would block the next attempt.
                shutil.rmtree(dest, ignore_errors=True)
                raise
        return files

    def _write_file(self, record: FileRecord, dest: Path, *, link: bool) -> None:
        blob = self._blob_path(record.sha256)
        if not self._has_blob(record):
            raise layout.bad_blob(self.uri, record)
        dest.parent.mkdir(parents=True, exist_ok=True)
        try:
            if link:
                link_or_copy(blob, dest)
            else:
                shutil.copyfile(blob, dest)
        except FileNotFoundError as error:
            # A collection has just deleted it.
            raise layout.bad_blob(self.uri, record) from error
        # Hash the copy, because the blob may have changed since.
        if file_digest(dest) != record.sha256:
            raise layout.bad_blob(self.uri, record)

    def _listing(self, digest: str) -> tuple[FileRecord, ...]:
        files = self.read_listing(digest)
        if files is None:
            raise layout.no_folder(self.uri, digest)
        return files

    def _has_blob(self, record: FileRecord) -> bool:
        stat = _stat(self._blob_path(record.sha256))
        return stat is not None and S_ISREG(stat.st_mode) and stat.st_size == record.size_bytes

    def _has_right_blob(self, record: FileRecord) -> bool:
        try:
            return self._has_blob(record) and file_digest(self._blob_path(record.sha256)) == record.sha256
        except FileNotFoundError:
            # A collection has just deleted it.
            return False

    def _read_dir(self) -> Path:
        """Return the parent of work folders for reading: in the store if this user can write to it."""
        folder = self.root / "tmp"
        try:
            check_writable(folder)
        except OSError:
            return self._work_dir
        return folder

    def _blob_path(self, sha256: str) -> Path:
        return self.root / layout.blob_key(sha256)


def _stored_file(path: Path, partial: Path) -> AbstractContextManager[Path]:
    return file_written_whole(path, partial=partial, read_only=True, durable=True)


def _entries(folder: Path) -> Sequence[Path]:
    """Return the entries of a folder, sorted; () if the folder does not exist."""
    try:
        # A glob would silently skip a folder that this user may not read.
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return ()


def _aged(paths: Iterable[Path]) -> Iterator[AgedObject]:
    for path in paths:
        if layout.is_digest(path.stem) and (stat := _stat(path)) is not None:
            yield AgedObject(path.stem, stat.st_size, time.time() - stat.st_mtime)


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        # A collection may have just deleted it.
        return None


def _refresh_if_old(path: Path) -> bool | None:
    """Reset the age of an old file, and return whether it was old; None if it must be written again."""
    stat = _stat(path)
    if stat is None:
        return None
    if time.time() - stat.st_mtime < REFRESH_AFTER_S:
        return False
    try:
        os.utime(path)
    except (FileNotFoundError, PermissionError):
        # A collection has just deleted it, or it belongs to another user.
        return None
    return True


def _delete_if_old(path: Path, min_age_s: float) -> bool:
    stat = _stat(path)
    if stat is None or time.time() - stat.st_mtime < min_age_s:
        return False
    path.unlink(missing_ok=True)
    return True
