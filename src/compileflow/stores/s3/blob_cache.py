"""BlobCache: verified blobs on this machine, from which opened folders are linked."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from compileflow._process.folders import file_written_whole
from compileflow.contracts import FileRecord
from compileflow.contracts.digests import file_digest


class BlobCache:
    """Blobs below one folder. Any process may add to it, and it may be deleted at any time.

    Args:
        root: Folder of the cache. Blobs are below sha256/, unfinished work below tmp/.
    """

    def __init__(self, root: Path):
        self.root = root

    def find(self, record: FileRecord) -> Path | None:
        """Return the path of a cached blob after hashing it again; None if it is missing or altered."""
        path = self._path(record)
        try:
            if path.stat().st_size == record.size_bytes and file_digest(path) == record.sha256:
                return path
        except FileNotFoundError:
            pass
        return None

    def add(self, record: FileRecord, *, work: Path, fetch: Callable[[Path], object]) -> Path:
        """Add a blob atomically and return its path. Do not write to the file.

        Args:
            record: Size and SHA-256 of the blob.
            work: Folder for unfinished files, on the same file system.
            fetch: Writes the verified blob to the given path.
        """
        path = self._path(record)
        with file_written_whole(path, partial=work / record.sha256, read_only=True) as partial:
            fetch(partial)
        return path

    def copy(self, record: FileRecord, dest: Path) -> bool:
        """Copy a cached blob to a writable file, and say whether the cache has it unaltered."""
        try:
            shutil.copyfile(self._path(record), dest)
        except FileNotFoundError:
            return False
        if dest.stat().st_size == record.size_bytes and file_digest(dest) == record.sha256:
            return True
        dest.unlink()
        return False

    def _path(self, record: FileRecord) -> Path:
        return self.root / "sha256" / record.sha256[:2] / record.sha256
