"""Give memory back to the system: pages of mapped files that were copied, and what the C library keeps free."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# madvise(2): the kernel reads the pages again when they are used.
_MADV_DONTNEED = 4
# A runtime reads some 50 MB in this time.
_INTERVAL_S = 0.02


@contextmanager
def released_pages(folder: Path) -> Iterator[None]:
    """Release the mapped pages of the files in a folder while the block runs, and at its end.

    A runtime maps its weights and copies them into a layout of its own. The pages that it has read would stay in
    memory beside the copies until the system runs short of memory.
    """
    if sys.platform != "linux":
        yield
        return
    is_over = threading.Event()
    # As the system names the files of its mappings.
    prefix = f"{folder.resolve()}/"

    def release() -> None:
        while not is_over.wait(_INTERVAL_S):
            _release(prefix)

    thread = threading.Thread(target=release, name="released_pages", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        _release(prefix)


def _release(prefix: str) -> None:
    system = ctypes.CDLL(None)
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        mappings = [line.split(maxsplit=5) for line in maps if prefix in line]
    for addresses, rights, _, _, _, path in mappings:
        # Pages that a process may write to could differ from the file.
        if path.startswith(prefix) and rights.startswith("r--"):
            start, end = (int(address, 16) for address in addresses.split("-"))
            system.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)


def trim_heap() -> None:
    """Let the C library give back the memory that it holds free for later, where it can: in glibc."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
