"""file://: an artifact store in a folder.

Layout: blobs/sha256/ab/<sha256>, manifests/sha256/<digest>.json (written last: the commit mark), and
records/<kind>/<key>.json, small pointers that may be replaced. tmp/ holds unfinished work, locks/ lock files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from urllib.parse import unquote, urlparse

from pydantic import JsonValue, ValidationError

from compileflow.contracts import StoredFolder
from compileflow.digests import FileRecord, file_digest, folder_digest, list_files, listing_bytes
from compileflow.errors import IntegrityError, SpecError, StoreError
from compileflow.settings import Settings
from compileflow.workspace import file_lock, os_errors, work_folder

_DIGEST = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


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
        files = list_files(folder)
        digest = folder_digest(files)
        with os_errors(self.root, "write to the store"), work_folder(self.root / "tmp", label="put") as work:
            for number, record in enumerate(files):
                self._put_blob(folder / record.path, record, work / str(number))
            self._place(listing_bytes(files), self._listing_path(digest), work / "listing")
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
        for path in sorted((self.root / "manifests" / "sha256").glob("*.json")):
            yield path.stem

    def folder_uri(self, digest: str) -> str:
        """Return the URI of the folder's listing."""
        return f"{self.uri}/manifests/sha256/{digest}.json"

    def put_record(self, kind: str, key: str, value: Mapping[str, JsonValue]) -> None:
        """Write a pointer; readers see the old one or the new one, never a part."""
        body = json.dumps(dict(value), sort_keys=True, indent=1).encode()
        with (
            os_errors(self.root, "write to the store"),
            work_folder(self.root / "tmp", label="record") as work,
        ):
            self._place(body, self._record_path(kind, key), work / "record", replace=True)

    def get_record(self, kind: str, key: str) -> dict[str, JsonValue] | None:
        """Read a pointer. One that is not JSON counts as absent."""
        try:
            data = json.loads(self._record_path(kind, key).read_bytes())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        return data if isinstance(data, dict) else None

    def lock(self, key: str, *, on_wait: Callable[[], None]) -> AbstractContextManager[None]:
        """Hold a key alone among all processes that use this folder on this machine."""
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        return file_lock(self.root / "locks" / f"{name}.lock", on_wait=on_wait)

    def _put_blob(self, path: Path, record: FileRecord, partial: Path) -> None:
        if self._has_blob(record):
            return
        shutil.copyfile(path, partial)
        if file_digest(partial) != record.sha256:
            raise StoreError(
                f"{path} changed while it was being stored.", hint="Run again when nothing writes to it."
            )
        self._move(partial, self._blob_path(record.sha256))

    def _place(self, body: bytes, path: Path, partial: Path, *, replace: bool = False) -> None:
        if path.exists() and not replace:
            return
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
        if not self._has_blob(record) or file_digest(blob) != record.sha256:
            raise IntegrityError(
                f"{self.uri}: the blob of {record.path} is absent or altered.",
                hint="Delete that blob and run again; it will be made anew.",
            )
        out.parent.mkdir(parents=True, exist_ok=True)
        if link:
            _link_or_copy(blob, out)
        else:
            shutil.copyfile(blob, out)

    def _listing(self, digest: str) -> tuple[FileRecord, ...]:
        path = self._listing_path(digest)
        try:
            body = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise IntegrityError(
                f"{self.uri} holds no folder {digest[:12]}...",
                hint="Check the URI; `compileflow versions` lists.",
            ) from error
        if hashlib.sha256(body).hexdigest() != digest:
            raise IntegrityError(f"{path} was altered.", hint="Delete it and run again; it will be made anew.")
        try:
            data = json.loads(body)
            return tuple(FileRecord.model_validate(record) for record in data["files"])
        except (ValueError, KeyError, TypeError, ValidationError) as error:
            raise IntegrityError(f"{path} is no listing: {error}.", hint="Do not use this store.") from error

    def _has_blob(self, record: FileRecord) -> bool:
        path = self._blob_path(record.sha256)
        return path.is_file() and path.stat().st_size == record.size_bytes

    def _blob_path(self, sha256: str) -> Path:
        return self.root / "blobs" / "sha256" / sha256[:2] / sha256

    def _listing_path(self, digest: str) -> Path:
        if not _DIGEST.fullmatch(digest):
            raise IntegrityError(f"{digest!r} is no digest.", hint="A digest is 64 hex digits.")
        return self.root / "manifests" / "sha256" / f"{digest}.json"

    def _record_path(self, kind: str, key: str) -> Path:
        if not _NAME.fullmatch(kind) or not _NAME.fullmatch(key):
            raise StoreError(f"{kind}/{key} is no record's name.", hint="Use letters, digits, '.', '_' and '-'.")
        return self.root / "records" / kind / f"{key}.json"


def _link_or_copy(blob: Path, out: Path) -> None:
    try:
        out.hardlink_to(blob)
    except OSError:
        # Another file system, or one without links.
        shutil.copyfile(blob, out)
