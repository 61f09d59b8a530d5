"""end_at_once: end a program at a signal, with one line. It imports little, because a program calls it first."""

from __future__ import annotations

import os
import signal

# Not from typing, whose import takes milliseconds.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType

WORDS = {signal.SIGINT: "Interrupted.", signal.SIGTERM: "Terminated."}


def end_at_once() -> None:
    """From now on, end the process at a signal, with one line.

    A program calls this before its other imports, because Python prints a traceback if a signal interrupts one.
    """
    for number in WORDS:
        signal.signal(number, end)


def end(number: int, _: FrameType | None) -> None:
    """Handle a signal: print one line, and end the process with the exit code of the signal."""
    try:
        os.write(2, f"{WORDS[signal.Signals(number)]}\n".encode())
    finally:
        os._exit(128 + number)
