"""SIGINT and SIGTERM: a command ends with one line and the exit code of the signal, 130 or 143."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from compileflow._process.end_at_once import WORDS, end, end_at_once

# timeout(1) sends its signal to the process and then to its group.
_REPEATED_S = 1.0
_last_at = -_REPEATED_S
_last_number: int | None = None


class Stopped(KeyboardInterrupt):
    """A signal asks this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raise Stopped at a signal within the block, so that work is undone; only in a program of `end_at_once`."""
    if signal.getsignal(signal.SIGINT) is not end:
        yield
        return
    for number in WORDS:
        signal.signal(number, _stop)
    try:
        yield
    finally:
        end_at_once()


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Let SIGINT and SIGTERM wait for the end of the block, so that a repeated one does not interrupt a cleanup.

    Prefect may send the signal of a cancelled run twice. Signals interrupt only the main thread; elsewhere, and
    where handlers are not Python's, this does nothing.
    """
    handlers = {number: signal.getsignal(number) for number in WORDS}
    if threading.current_thread() is not threading.main_thread() or None in handlers.values():
        yield
        return
    waiting: list[int] = []
    for number in WORDS:
        signal.signal(number, lambda number, _: waiting.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if waiting:
            # Not os.kill, whose signal may arrive after this thread has gone on.
            signal.raise_signal(waiting[0])


def signal_of(error: KeyboardInterrupt) -> int:
    """Return the signal behind an interrupt; SIGINT unless it is a Stopped."""
    return int(error.args[0]) if isinstance(error, Stopped) else signal.SIGINT


def swallowed() -> Stopped | None:
    """Return the interrupt of the last signal; None before the first one.

    Code in C, such as pydantic's, turns what a signal raises within it into an error of its own.
    """
    return None if _last_number is None else Stopped(_last_number)


def word_for(number: int) -> str:
    """Return the first word that a command prints after a signal."""
    return WORDS[signal.Signals(number)]


def _stop(number: int, _: FrameType | None) -> None:
    global _last_at, _last_number
    if time.monotonic() - _last_at >= _REPEATED_S:
        _last_at, _last_number = time.monotonic(), number
        raise Stopped(number)
