"""Files by their SHA-256: written to a temporary file, flushed to disk, then moved into place in one step."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Container, Iterator
from pathlib import Path
from typing import IO, Protocol

BLOCK_BYTES = 1 << 20


class Reader(Protocol):
    """A source of bytes that returns fewer bytes than asked for only at its end."""

    def read(self, size: int, /) -> bytes:
        """Return up to `size` bytes."""


class Blobs:
    """The folder of complete files, and the folder of incomplete files.

    Args:
        folder: Folder of complete files, by digest.
        unfinished: Folder of incomplete files, on the same file system.
    """

    def __init__(self, folder: Path, unfinished: Path):
        self._folder = folder
        self._unfinished = unfinished
        folder.mkdir(parents=True, exist_ok=True)
        unfinished.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        """Return the path of a complete file."""
        return self._folder / sha256[:2] / sha256

    def unfinished(self, upload: str) -> Path:
        """Return the path of an upload that is not complete."""
        return self._unfinished / upload

    def add(self, reader: Reader) -> tuple[str, int]:
        """Store all bytes of a reader; return their SHA-256 and their number."""
        descriptor, name = tempfile.mkstemp(dir=self._unfinished)
        path = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                for block in blocks(reader):
                    file.write(block)
            return self.place(path)
        finally:
            path.unlink(missing_ok=True)

    def place(self, path: Path) -> tuple[str, int]:
        """Flush a temporary file to disk and link it to its digest; return its SHA-256 and its size in bytes.

        The caller deletes the temporary file after the database refers to the digest.
        """
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            size = os.fstat(file.fileno()).st_size
            os.fsync(file.fileno())
        target = self.path(sha256)
        target.parent.mkdir(exist_ok=True)
        link = self._unfinished / f"{path.name}.whole"
        link.unlink(missing_ok=True)
        os.link(path, link)
        link.replace(target)
        # After a kill, link and target may be the same file; replace then leaves the link behind.
        link.unlink(missing_ok=True)
        _flush_folder(target.parent)
        _flush_folder(self._folder)
        return sha256, size

    def open_unnamed(self) -> IO[bytes]:
        """Return a temporary file without a name, so that even a crash leaves nothing behind."""
        return tempfile.TemporaryFile(dir=self._unfinished)

    def sweep(self, *, used: Container[str], uploads: Container[str]) -> int:
        """Delete complete files that no field uses and incomplete files that belong to no upload.

        Call it while no request is in progress.

        Returns:
            The number of deleted files.
        """
        stale = [path for path in self._folder.glob("*/*") if path.name not in used]
        stale += [path for path in self._unfinished.iterdir() if path.name not in uploads]
        for path in stale:
            path.unlink()
        return len(stale)


def blocks(reader: Reader) -> Iterator[bytes]:
    """Yield the bytes of a reader, at most `BLOCK_BYTES` at a time."""
    while block := reader.read(BLOCK_BYTES):
        yield block


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
