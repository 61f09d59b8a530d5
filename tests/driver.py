"""Run the four steps as a process of its own, killed where the test says: python -m tests.driver MODEL [PLACE].

PLACE is "compile", "register", or "upload:N", the N-th file that the store puts in its place. But for "compile",
the steps start no processes of their own: the imports of each would take longer than all the rest.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from compileflow.registries import sqlite as sqlite_registry
from compileflow.settings import get_settings
from compileflow.stores.local import LocalStore
from tests.steps import Pipeline, in_process


def die() -> None:
    """End as the kernel or an impatient operator ends a process."""
    os.kill(os.getpid(), signal.SIGKILL)


class Lines(list[str]):
    """Progress lines, printed at once; deadly at one of them when asked."""

    def __init__(self, deadly: str):
        super().__init__()
        self._deadly = deadly

    def append(self, line: str) -> None:
        print(line, flush=True)
        if self._deadly and line.startswith(self._deadly):
            die()


def arm(place: str) -> str:
    """Prepare the death; return the progress line at which it comes, if it comes at one."""
    if place.startswith("upload:"):
        left = int(place.partition(":")[2])
        move = LocalStore._move

        def deadly_move(self: LocalStore, partial: Path, path: Path) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                partial.write_bytes(partial.read_bytes()[: partial.stat().st_size // 2])
                die()
            move(self, partial, path)

        LocalStore._move = deadly_move  # type: ignore[method-assign]
    elif place == "register":
        # Called after the row is inserted, before it is committed.
        def deadly_version(row: Any) -> Any:
            die()

        sqlite_registry._version = deadly_version
    return "tracing" if place == "compile" else ""


if __name__ == "__main__":
    deadly = arm(sys.argv[2] if len(sys.argv) > 2 else "")
    settings = get_settings()
    with ExitStack() as stack:
        if not deadly:
            stack.enter_context(in_process(settings, pytest.MonkeyPatch()))
        pipeline = Pipeline(settings, lines=Lines(deadly))
        request = pipeline.request(Path(sys.argv[1]))
        artifact = pipeline.compile(request)
        print("cached" if artifact.cached else "compiled")
        print(f"version {pipeline.run(request).version}")
