"""TransferProgress: a progress bar on a terminal for transfers that take more than two seconds."""

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
    """Counts bytes from several threads. After two seconds, a terminal shows bytes, rate and time left."""

    def __init__(self, action: str, total_bytes: int):
        self._action = action
        self._total_bytes = total_bytes
        self._moved_bytes = 0
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._bar: Progress | None = None
        self._visible = sys.stderr.isatty()

    def add(self, size_bytes: int) -> None:
        """Count bytes that were sent, were fetched, or need no transfer."""
        with self._lock:
            self._moved_bytes += size_bytes
            if not self._visible:
                return
            if self._bar is None and time.monotonic() - self._started >= SHOW_AFTER_S:
                self._bar = _bar()
                self._task = self._bar.add_task(self._action, total=self._total_bytes)
                self._bar.start()
            if self._bar is not None:
                self._bar.update(self._task, completed=self._moved_bytes)

    def __enter__(self) -> TransferProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._visible = False
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
