"""LocalStore, file://: an artifact store in a folder of this machine, in the layout that all stores share.

Beside the shared layout, tmp/ holds unfinished work and locks/ holds lock files.

Others may write to the store. So none of its folders may be a link, which could lead anywhere, and what is read
from it was hashed while it was copied to where they cannot write.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from stat import S_ISREG, S_IWGRP, S_IWOTH
from typing import BinaryIO
from urllib.parse import urlparse

from pydantic import JsonValue

from compileflow._process.folders import (
    check_no_link,
    file_lock,
    folder_handle,
    open_regular,
    os_errors,
    path_of_uri,
    sweep,
    work_folder,
)
from compileflow.contracts import Collected, FileRecord, StoredFolder
from compileflow.contracts.digests import file_digest, folder_digest, list_files, listing_bytes
from compileflow.contracts.json_files import read_bytes
from compileflow.errors import IntegrityError, SpecError
from compileflow.settings import Settings
from compileflow.stores import layout
from compileflow.stores.collecting import REFRESH_AFTER_S, AgedObject, collect

# Attempts of a put. A collection may delete what an attempt found in the store.
_PUT_ATTEMPTS = 5
# A store may be on a network file system, which answers several requests at once.
_READS_AT_ONCE = 8
_BLOCK_BYTES = 2**20


class LocalStore:
    """Folders as content-addressed blobs below one folder of this machine."""

    def __init__(self, uri: str, settings: Settings):
        """Keep the folder's path, and that of the work folder for copies that are read."""
        url = urlparse(uri)
        if url.scheme != "file" or url.netloc not in ("", "localhost") or not url.path:
            raise SpecError(
                f"{uri!r} is not the URI of a local folder.", hint="Write it as file:///absolute/path."
            )
        self.uri = uri.rstrip("/")
        self.root = path_of_uri(uri)
        self._needs_signatures = settings.signing_key is not None or settings.require_signature
        self._home_dir = settings.home_dir
        self._work_dir = settings.work_dir

    def put_folder(self, folder: Path) -> StoredFolder:
        """Copy the blobs that the store lacks, then write the listing.

        Raises:
            StoreError: The store cannot be written, or the folder changed during the copy.
        """
        with os_errors(folder, "read"):
            files = list_files(folder)
        digest = folder_digest(files)
        with os_errors(self.root, "write to the store"), self._work_folder("put") as work:
            for _ in range(_PUT_ATTEMPTS):
                refreshes = [self._put_blob(folder / record.path, record, work) for record in files]
                refreshes.append(self._put_listing(listing_bytes(files), digest, work))
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
        return self._write_out(digest, dest)

    @contextmanager
    def open_folder(self, digest: str) -> Iterator[Path]:
        """Give a verified copy below COMPILEFLOW_HOME. Do not write to it.

        It may consist of hard links if the store is in the same home, and no signature is made or required.
        """
        with work_folder(self._work_dir, label="read") as work:
            may_link = not self._needs_signatures and self.root.resolve().is_relative_to(self._home_dir.resolve())
            self._write_out(digest, work / "folder", read_only=True, may_link=may_link)
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
        return filter(layout.is_digest, self._json_names(layout.LISTINGS))

    def folder_uri(self, digest: str) -> str:
        """Return the URI of the folder's listing."""
        return f"{self.uri}/{layout.LISTINGS}{digest}.json"

    def put_record(self, kind: str, key: str, value: Mapping[str, JsonValue]) -> None:
        """Write a record atomically: readers see the old value or the new one."""
        path = self._path(layout.record_key(kind, key))
        with (
            os_errors(self.root, "write to the store"),
            self._work_folder("record") as work,
            self._stored_file(path, work) as partial,
        ):
            partial.write(layout.record_body(dict(value)))

    def get_record(self, kind: str, key: str) -> dict[str, JsonValue] | None:
        """Return the value of a record; None if it is missing or cannot be used."""
        path = self._path(layout.record_key(kind, key))
        try:
            body = _read(path, most_bytes=layout.MOST_RECORD_BYTES)
        except ValueError as error:
            layout.ignore_record(str(path), str(error))
            return None
        return layout.parse_record(body, str(path)) if body is not None else None

    def list_records(self, kind: str) -> Iterator[str]:
        """Yield the keys of all records of a kind, sorted."""
        return filter(layout.is_record_name, self._json_names(layout.records_key(kind)))

    def lock(self, key: str, *, on_wait: Callable[[], None]) -> AbstractContextManager[None]:
        """Hold a lock that excludes all other processes on this machine that use this folder."""
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        return file_lock(self._path(f"locks/{name}.lock"), on_wait=on_wait)

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
                sweep(self._folder("tmp"), below=self.root)
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
        return _aged(_entries(self._folder(layout.LISTINGS)))

    def aged_blobs(self) -> Iterator[AgedObject]:
        """Yield all blobs."""
        folders = [self._folder(layout.BLOBS + path.name) for path in _entries(self._folder(layout.BLOBS))]
        return _aged(path for folder in folders for path in _entries(folder))

    def read_listing(self, digest: str) -> tuple[FileRecord, ...] | None:
        """Return the files of a folder; None if its listing does not exist."""
        path = self._path(layout.listing_key(digest))
        try:
            body = _read(path, most_bytes=layout.MOST_LISTING_BYTES)
        except ValueError as error:
            raise layout.bad_listing(str(path), error) from error
        return layout.parse_listing(body, digest, str(path)) if body is not None else None

    def delete_listing(self, digest: str, *, min_age_s: float) -> bool:
        """Delete a listing if it is still at least that old."""
        return self._delete_if_old(self._path(layout.listing_key(digest)), min_age_s)

    def delete_blob(self, sha256: str, *, min_age_s: float) -> bool:
        """Delete a blob if it is still at least that old."""
        return self._delete_if_old(self._blob_path(sha256), min_age_s)

    def _json_names(self, prefix: str) -> Iterator[str]:
        with os_errors(self.root, "read the store"):
            paths = _entries(self._folder(prefix))
        for path in paths:
            if path.suffix == ".json":
                yield path.stem

    def _put_blob(self, path: Path, record: FileRecord, work: int) -> bool:
        """Copy a file into the store unless it is there, unaltered. Return whether an old blob was refreshed."""
        blob = self._blob_path(record.sha256)
        if self._has_right_blob(record) and (was_refreshed := self._refresh_if_old(blob)) is not None:
            return was_refreshed
        with path.open("rb") as file, self._stored_file(blob, work) as copy:
            if _copy(file, copy, most_bytes=record.size_bytes) != record.sha256:
                raise layout.changed_while_stored(path)
        return False

    def _put_listing(self, body: bytes, digest: str, work: int) -> bool:
        """Write a listing unless it is there, unaltered. Return whether an old listing was refreshed."""
        path = self._path(layout.listing_key(digest))
        if _holds(path, body) and (was_refreshed := self._refresh_if_old(path)) is not None:
            return was_refreshed
        with self._stored_file(path, work) as listing:
            listing.write(body)
        return False

    def _write_out(
        self, digest: str, dest: Path, *, read_only: bool = False, may_link: bool = False
    ) -> tuple[FileRecord, ...]:
        files = self._listing(digest)
        with os_errors(dest, "write to"):
            dest.mkdir(parents=True)
            try:
                for record in files:
                    self._write_file(record, dest / record.path, read_only=read_only, may_link=may_link)
            except BaseException:
                # A partial folder would block the next attempt.
                shutil.rmtree(dest, ignore_errors=True)
                raise
        return files

    def _write_file(self, record: FileRecord, dest: Path, *, read_only: bool, may_link: bool) -> None:
        blob = self._blob_path(record.sha256)
        if not self._has_blob(record):
            raise layout.bad_blob(self.uri, record)
        dest.parent.mkdir(parents=True, exist_ok=True)
        try:
            if may_link and _link(blob, dest):
                digest = file_digest(dest)
            else:
                with os.fdopen(open_regular(blob), "rb") as file, dest.open("xb") as copy:
                    digest = _copy(file, copy, most_bytes=record.size_bytes)
                    if read_only:
                        os.fchmod(copy.fileno(), 0o444)
        except (FileNotFoundError, ValueError) as error:
            # A collection has just deleted it, or another process has replaced it.
            raise layout.bad_blob(self.uri, record) from error
        if digest != record.sha256:
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
            # Another process may have put a named pipe in its place.
            with os.fdopen(open_regular(self._blob_path(record.sha256)), "rb") as file:
                return self._has_blob(record) and _copy(file, None, most_bytes=record.size_bytes) == record.sha256
        except (FileNotFoundError, ValueError):
            # A collection has just deleted it, or another process has replaced it.
            return False

    def _blob_path(self, sha256: str) -> Path:
        return self._path(layout.blob_key(sha256))

    def _path(self, key: str) -> Path:
        """Return the path of an object. Its folder is not a link."""
        return self._folder(key.rpartition("/")[0]) / key.rpartition("/")[2]

    def _folder(self, key: str) -> Path:
        """Return the path of a folder of the store.

        Raises:
            StoreError: It is a link, or lies below one.
        """
        folder = self.root / key
        with os_errors(folder, "read"):
            check_no_link(folder, below=self.root)
        return folder

    @contextmanager
    def _work_folder(self, label: str) -> Iterator[int]:
        """Give the handle of an empty folder for unfinished files, which is deleted after the block."""
        with (
            work_folder(self._folder("tmp"), label=label, below=self.root) as work,
            folder_handle(work, below=self.root) as handle,
        ):
            yield handle

    @contextmanager
    def _stored_file(self, path: Path, work: int) -> Iterator[BinaryIO]:
        """Give a new file to write in a work folder, which gets its final path once its content is on disk."""
        path.parent.mkdir(parents=True, exist_ok=True)
        # Nothing that another process has put there is opened, or deleted below.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        handle = os.open(path.name, flags, 0o600, dir_fd=work)
        try:
            with os.fdopen(handle, "wb") as stream:
                yield stream
                stream.flush()
                os.fchmod(stream.fileno(), 0o444)
                os.fsync(stream.fileno())
            with os_errors(path, "replace"), folder_handle(path.parent, below=self.root) as folder:
                os.replace(path.name, path.name, src_dir_fd=work, dst_dir_fd=folder)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(path.name, dir_fd=work)

    def _refresh_if_old(self, path: Path) -> bool | None:
        """Reset the age of an old file, and return whether it was old; None if it must be written again."""
        stat = _stat(path)
        if stat is None:
            return None
        if time.time() - stat.st_mtime < REFRESH_AFTER_S:
            return False
        try:
            with folder_handle(path.parent, below=self.root) as folder:
                os.utime(path.name, dir_fd=folder, follow_symlinks=False)
        except (FileNotFoundError, PermissionError):
            # A collection has just deleted it, or it belongs to another user.
            return None
        return True

    def _delete_if_old(self, path: Path, min_age_s: float) -> bool:
        with (
            suppress(FileNotFoundError, NotADirectoryError),
            folder_handle(path.parent, below=self.root) as folder,
        ):
            stat = os.stat(path.name, dir_fd=folder, follow_symlinks=False)
            if time.time() - stat.st_mtime >= min_age_s:
                os.unlink(path.name, dir_fd=folder)
                return True
        return False


def _copy(file: BinaryIO, copy: BinaryIO | None, *, most_bytes: int) -> str:
    """Copy a file, but not much more than a number of bytes, and return the SHA-256 of what was read."""
    sha256 = hashlib.sha256()
    size_bytes = 0
    while size_bytes <= most_bytes and (block := file.read(_BLOCK_BYTES)):
        sha256.update(block)
        size_bytes += len(block)
        if copy is not None:
            copy.write(block)
    return sha256.hexdigest()


def _link(blob: Path, dest: Path) -> bool:
    """Give a blob a second name, if no other user can write to it. Return whether it has one."""
    stat = blob.lstat()
    if stat.st_uid != os.geteuid() or stat.st_mode & (S_IWGRP | S_IWOTH):
        return False
    try:
        dest.hardlink_to(blob)
    except OSError:
        # They are on different file systems, the file system has no links, or the blob was just deleted.
        return False
    return True


def _read(path: Path, *, most_bytes: int) -> bytes | None:
    """Return the bytes of a file; None if it does not exist. Raises a ValueError if no store writes such files."""
    with os_errors(path, "read"):
        try:
            return read_bytes(path, most_bytes=most_bytes)
        except (FileNotFoundError, NotADirectoryError):
            return None


def _holds(path: Path, body: bytes) -> bool:
    try:
        return _read(path, most_bytes=len(body)) == body
    except ValueError:
        return False


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
        return path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        # A collection may have just deleted it.
        return None
