"""SIGINT and SIGTERM: a command ends with one line and the exit code of the signal, 130 or 143."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_WORDS = {signal.SIGINT: "Interrupted.", signal.SIGTERM: "Terminated."}
# timeout(1) sends its signal to the process and then to its group.
_REPEATED_S = 1.0
_last_at = -_REPEATED_S


class Stopped(KeyboardInterrupt):
    """A signal asks this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)


def end_at_once() -> None:
    """From now on, end the process at a signal, with one line.

    A program calls this first, because Python would print a traceback if a signal interrupts an import.
    """
    for number in _WORDS:
        signal.signal(number, _end)


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raise Stopped at a signal within the block, so that work is undone; only in a program of `end_at_once`."""
    if signal.getsignal(signal.SIGINT) is not _end:
        yield
        return
    for number in _WORDS:
        signal.signal(number, _stop)
    try:
        yield
    finally:
        end_at_once()


def signal_of(error: KeyboardInterrupt) -> int:
    """Return the signal behind an interrupt; SIGINT unless it is a Stopped."""
    return int(error.args[0]) if isinstance(error, Stopped) else signal.SIGINT


def word_for(number: int) -> str:
    """Return the first word that a command prints after a signal."""
    return _WORDS[signal.Signals(number)]


def _end(number: int, _: FrameType | None) -> None:
    with suppress(OSError):
        os.write(2, f"{word_for(number)}\n".encode())
    os._exit(128 + number)


def _stop(number: int, _: FrameType | None) -> None:
    global _last_at
    if time.monotonic() - _last_at >= _REPEATED_S:
        _last_at = time.monotonic()
        raise Stopped(number)
