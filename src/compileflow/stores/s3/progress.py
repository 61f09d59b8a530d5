"""A progress bar for transfers that take a while and that somebody watches; silence otherwise."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

SHOW_AFTER_S = 2.0


class TransferProgress:
    """Counts bytes from several threads; after two seconds a terminal shows bytes, rate and time left."""

    def __init__(self, doing: str, total_bytes: int):
        self._doing = doing
        self._total = total_bytes
        self._done = 0
        self._began = time.monotonic()
        self._changing = threading.Lock()
        self._bar: Progress | None = None
        self._watched = sys.stderr.isatty()

    def add(self, size_bytes: int) -> None:
        """Count what was sent, fetched, or found to be there already."""
        with self._changing:
            self._done += size_bytes
            if not self._watched:
                return
            if self._bar is None and time.monotonic() - self._began >= SHOW_AFTER_S:
                self._bar = _bar()
                self._task = self._bar.add_task(self._doing, total=self._total)
                self._bar.start()
            if self._bar is not None:
                self._bar.update(self._task, completed=self._done)

    def __enter__(self) -> TransferProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changing:
            self._watched = False
            if self._bar is not None:
                self._bar.stop()


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
    )
