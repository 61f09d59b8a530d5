"""Files by their SHA-256: written aside, flushed to disk, then moved into place in one step."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

PIECE = 1 << 20


class Reader(Protocol):
    """Something to read bytes from; fewer than asked only at its end."""

    def read(self, size: int, /) -> bytes:
        """Return up to `size` bytes."""


class Blobs:
    """The folder of files, and the one beside it for what is unfinished.

    Args:
        folder: Finished files, by digest.
        unfinished: On the same file system.
    """

    def __init__(self, folder: Path, unfinished: Path):
        self._folder = folder
        self._unfinished = unfinished
        folder.mkdir(parents=True, exist_ok=True)
        unfinished.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        """Return where a file is."""
        return self._folder / sha256[:2] / sha256

    def unfinished(self, name: str) -> Path:
        """Return where an unfinished upload is."""
        return self._unfinished / name

    def add(self, reader: Reader) -> tuple[str, int]:
        """Keep all that `reader` gives, a piece at a time; return its SHA-256 and its size in bytes."""
        with self._aside() as (file, path):
            for piece in pieces(reader):
                file.write(piece)
            file.flush()
            return self.place(path)

    def place(self, path: Path) -> tuple[str, int]:
        """Flush an unfinished file to disk and link it to its digest; return that and its size in bytes.

        The caller deletes the unfinished file, once whatever refers to the digest is kept, too.
        """
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            size = os.fstat(file.fileno()).st_size
            os.fsync(file.fileno())
        target = self.path(sha256)
        target.parent.mkdir(exist_ok=True)
        fresh = self._unfinished / f"{path.name}.whole"
        fresh.unlink(missing_ok=True)
        os.link(path, fresh)
        fresh.replace(target)
        # Where both are links to one file, as after a kill, replace leaves this one behind.
        fresh.unlink(missing_ok=True)
        _flush_folder(target.parent)
        _flush_folder(self._folder)
        return sha256, size

    def nameless(self) -> IO[bytes]:
        """Return a file to write and read that has no name, so that even a crash leaves nothing."""
        return tempfile.TemporaryFile(dir=self._unfinished)

    def sweep(self, *, used: Container[str], uploads: Container[str]) -> int:
        """Delete finished files that nothing refers to and unfinished ones that no upload goes on with.

        Call it while nobody writes. Returns the number of files deleted.
        """
        stale = [path for path in self._folder.glob("*/*") if path.name not in used]
        stale += [path for path in self._unfinished.iterdir() if path.name not in uploads]
        for path in stale:
            path.unlink()
        return len(stale)

    @contextmanager
    def _aside(self) -> Iterator[tuple[IO[bytes], Path]]:
        number, name = tempfile.mkstemp(dir=self._unfinished)
        path = Path(name)
        try:
            with os.fdopen(number, "wb") as file:
                yield file, path
        finally:
            path.unlink(missing_ok=True)


def pieces(reader: Reader) -> Iterator[bytes]:
    """Give what there is to read, at most `PIECE` bytes at a time."""
    while piece := reader.read(PIECE):
        yield piece


def _flush_folder(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
