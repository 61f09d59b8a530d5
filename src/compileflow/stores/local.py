"""file://: an artifact store in a folder, in the layout of all stores; tmp/ and locks/ belong to those at work."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from stat import S_ISREG
from urllib.parse import unquote, urlparse

from pydantic import JsonValue

from compileflow._process.folders import file_lock, os_errors, work_folder
from compileflow.contracts import Collected, FileRecord, StoredFolder
from compileflow.contracts.digests import file_digest, folder_digest, list_files, listing_bytes
from compileflow.errors import IntegrityError, SpecError
from compileflow.settings import Settings
from compileflow.stores import layout
from compileflow.stores.collecting import REFRESH_AFTER_S, Aged, collect

# How often a put starts again when a collection took what it relied on.
_PUTS = 5


class LocalStore:
    """Folders as content-addressed blobs below one folder of this machine."""

    def __init__(self, uri: str, settings: Settings):
        """Take the settings that every store takes; a folder needs none of them."""
        parsed = urlparse(uri)
        if parsed.scheme != "file" or parsed.netloc not in ("", "localhost") or not parsed.path:
            raise SpecError(f"{uri!r} is no folder's URI.", hint="Write it as file:///absolute/path.")
        self.uri = uri.rstrip("/")
        self.root = Path(unquote(parsed.path))

    def put_folder(self, folder: Path) -> StoredFolder:
        """Copy what is not there yet, then write the listing.

        Raises:
            StoreError: the store cannot be written, or the folder changed while it was copied.
        """
        with os_errors(folder, "read"):
            files = list_files(folder)
        digest = folder_digest(files)
        with os_errors(self.root, "write to the store"), work_folder(self.root / "tmp", label="put") as work:
            for _ in range(_PUTS):
                refreshed = [
                    self._put_blob(folder / record.path, record, work / str(number))
                    for number, record in enumerate(files)
                ]
                refreshed.append(self._put_listing(listing_bytes(files), digest, work / "listing"))
                # stores/collecting.py says why.
                if not any(refreshed) or self.exists(digest):
                    break
            else:
                raise layout.collected_meanwhile(self.uri, folder)
        return StoredFolder(self.folder_uri(digest), digest, sum(record.size_bytes for record in files))

    def get_folder(self, digest: str, dest: Path) -> tuple[FileRecord, ...]:
        """Copy a folder out of the store, checking every SHA-256.

        Raises:
            IntegrityError: the folder is absent, or a blob is absent or altered.
            StoreError: `dest` exists or cannot be written.
        """
        return self._write_out(digest, dest, link=False)

    @contextmanager
    def open_folder(self, digest: str) -> Iterator[Path]:
        """Give a verified copy made of hard links; nobody may write to it."""
        with work_folder(self.root / "tmp", label="read") as work:
            self._write_out(digest, work / "folder", link=True)
            yield work / "folder"

    def exists(self, digest: str) -> bool:
        """Say whether the listing and every blob, at its right size, are there."""
        try:
            files = self._listing(digest)
        except IntegrityError:
            return False
        return all(self._has_blob(record) for record in files)

    def list(self) -> Iterator[str]:
        """Yield the digests of all folders, sorted."""
        with os_errors(self.root, "read the store"):
            found = _below(self.root / layout.LISTINGS)
        for path in found:
            if path.suffix == ".json":
                yield path.stem

    def folder_uri(self, digest: str) -> str:
        """Return the URI of the folder's listing."""
        return f"{self.uri}/manifests/sha256/{digest}.json"

    def put_record(self, kind: str, key: str, value: Mapping[str, JsonValue]) -> None:
        """Write a pointer; readers see the old one or the new one, never a part."""
        path = self.root / layout.record_key(kind, key)
        with (
            os_errors(self.root, "write to the store"),
            work_folder(self.root / "tmp", label="record") as work,
        ):
            self._place(layout.record_body(dict(value)), path, work / "record")

    def get_record(self, kind: str, key: str) -> dict[str, JsonValue] | None:
        """Read a pointer. One that is not JSON counts as absent."""
        body = self._read(self.root / layout.record_key(kind, key))
        return layout.parse_record(body) if body is not None else None

    def list_records(self, kind: str) -> Iterator[str]:
        """Yield the keys of all pointers of a kind, sorted."""
        with os_errors(self.root, "read the store"):
            found = _below(self.root / layout.records_key(kind))
        for path in found:
            if path.suffix == ".json":
                yield path.stem

    def lock(self, key: str, *, on_wait: Callable[[], None]) -> AbstractContextManager[None]:
        """Hold a key alone among all processes that use this folder on this machine."""
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        return file_lock(self.root / "locks" / f"{name}.lock", on_wait=on_wait)

    def gc(self, keep: Collection[str], *, min_age_s: float, dry_run: bool = False) -> Collected:
        """Delete what nobody needs, in the order and with the ages that stores/collecting.py explains.

        Raises:
            IntegrityError: a listing cannot be read; nothing was deleted.
            StoreError: the store cannot be written.
        """
        with os_errors(self.root, "collect garbage in"):
            return collect(self, keep, min_age_s=min_age_s, dry_run=dry_run)

    def aged_listings(self) -> Iterator[Aged]:
        """Yield all listings."""
        return _aged(_below(self.root / layout.LISTINGS))

    def aged_blobs(self) -> Iterator[Aged]:
        """Yield all blobs."""
        return _aged(path for part in _below(self.root / layout.BLOBS) for path in _below(part))

    def read_listing(self, digest: str) -> tuple[FileRecord, ...] | None:
        """Return the files of a folder, or None when it has gone."""
        path = self.root / layout.listing_key(digest)
        body = self._read(path)
        return layout.parse_listing(body, digest, str(path)) if body is not None else None

    def delete_listing(self, digest: str, *, min_age_s: float) -> bool:
        """Delete a listing if it is still that old."""
        return _delete_old(self.root / layout.listing_key(digest), min_age_s)

    def delete_blob(self, sha256: str, *, min_age_s: float) -> bool:
        """Delete a blob if it is still that old."""
        return _delete_old(self._blob_path(sha256), min_age_s)

    def _read(self, path: Path) -> bytes | None:
        with os_errors(path, "read"):
            try:
                return path.read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def _put_blob(self, path: Path, record: FileRecord, partial: Path) -> bool:
        """Copy a file unless it is there, and say whether an old one was found and refreshed."""
        blob = self._blob_path(record.sha256)
        if self._has_blob(record) and (refreshed := _refreshed(blob)) is not None:
            return refreshed
        shutil.copyfile(path, partial)
        if file_digest(partial) != record.sha256:
            raise layout.changed_while_stored(path)
        self._move(partial, blob)
        return False

    def _put_listing(self, body: bytes, digest: str, partial: Path) -> bool:
        path = self.root / layout.listing_key(digest)
        if path.exists() and (refreshed := _refreshed(path)) is not None:
            return refreshed
        self._place(body, path, partial)
        return False

    def _place(self, body: bytes, path: Path, partial: Path) -> None:
        partial.write_bytes(body)
        self._move(partial, path)

    def _move(self, partial: Path, path: Path) -> None:
        """Give a finished file its name; on disk before the name is."""
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.chmod(0o444)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.replace(path)

    def _write_out(self, digest: str, dest: Path, *, link: bool) -> tuple[FileRecord, ...]:
        files = self._listing(digest)
        with os_errors(dest, "write to"):
            dest.mkdir(parents=True)
            try:
                for record in files:
                    self._write_file(record, dest / record.path, link=link)
            except BaseException:
                # A half-written folder would stand in the way of the next try.
                shutil.rmtree(dest, ignore_errors=True)
                raise
        return files

    def _write_file(self, record: FileRecord, out: Path, *, link: bool) -> None:
        blob = self._blob_path(record.sha256)
        if not self._has_blob(record):
            raise layout.bad_blob(self.uri, record)
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            if link:
                layout.link_or_copy(blob, out)
            else:
                shutil.copyfile(blob, out)
        except FileNotFoundError as error:
            # Collected this moment.
            raise layout.bad_blob(self.uri, record) from error
        # Of what is given away, not of what was there a moment before.
        if file_digest(out) != record.sha256:
            raise layout.bad_blob(self.uri, record)

    def _listing(self, digest: str) -> tuple[FileRecord, ...]:
        files = self.read_listing(digest)
        if files is None:
            raise layout.no_folder(self.uri, digest)
        return files

    def _has_blob(self, record: FileRecord) -> bool:
        stat = _stat(self._blob_path(record.sha256))
        return stat is not None and S_ISREG(stat.st_mode) and stat.st_size == record.size_bytes

    def _blob_path(self, sha256: str) -> Path:
        return self.root / layout.blob_key(sha256)


def _below(folder: Path) -> Sequence[Path]:
    """Return what is in a folder, sorted; nothing where there is none."""
    try:
        # Not a glob, which passes over what this user may not read.
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return ()


def _aged(paths: Iterable[Path]) -> Iterator[Aged]:
    for path in paths:
        if layout.is_digest(path.stem) and (stat := _stat(path)) is not None:
            yield Aged(path.stem, stat.st_size, time.time() - stat.st_mtime)


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        # Collected this moment.
        return None


def _refreshed(path: Path) -> bool | None:
    """Make an old file young again and say whether it was old; None: it cannot be relied on, write it anew."""
    stat = _stat(path)
    if stat is None:
        return None
    if time.time() - stat.st_mtime < REFRESH_AFTER_S:
        return False
    try:
        os.utime(path)
    except (FileNotFoundError, PermissionError):
        # Collected, too, or another user's.
        return None
    return True


def _delete_old(path: Path, min_age_s: float) -> bool:
    stat = _stat(path)
    if stat is None or time.time() - stat.st_mtime < min_age_s:
        return False
    path.unlink(missing_ok=True)
    return True
