"""Run the four steps in a separate process, which kills itself at a place: python -m tests.driver MODEL [PLACE].

PLACE is "compile", "register", or "upload:N", the N-th file that the store writes. Except for "compile", the steps
start no child processes, because the imports of each child would take longer than all the rest.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from compileflow.registries import sqlite as sqlite_registry
from compileflow.settings import get_settings
from compileflow.stores.local import LocalStore
from tests.in_process import InProcess
from tests.steps import Pipeline


def die() -> None:
    """Kill this process, as the kernel or an operator would."""
    os.kill(os.getpid(), signal.SIGKILL)


class Lines(list[str]):
    """Progress lines, which are printed at once. One of them may kill the process."""

    def __init__(self, deadly: str):
        super().__init__()
        self._deadly = deadly

    def append(self, line: str) -> None:
        print(line, flush=True)
        if self._deadly and line.startswith(self._deadly):
            die()


def arm(place: str) -> str:
    """Prepare the kill; return the progress line at which it happens, or '' if it happens elsewhere."""
    if place.startswith("upload:"):
        remaining = int(place.partition(":")[2])
        stored_file = LocalStore._stored_file

        @contextmanager
        def deadly_file(store: LocalStore, path: Path, work: int) -> Iterator[BinaryIO]:
            nonlocal remaining
            with stored_file(store, path, work) as stream:
                yield stream
                remaining -= 1
                if remaining == 0:
                    stream.truncate(stream.tell() // 2)
                    die()

        LocalStore._stored_file = deadly_file
    elif place == "register":
        # The registry calls this after it inserts the row and before it commits.
        def deadly_version(row: Any) -> Any:
            die()

        sqlite_registry._version = deadly_version
    return "tracing" if place == "compile" else ""


if __name__ == "__main__":
    deadly = arm(sys.argv[2] if len(sys.argv) > 2 else "")
    settings = get_settings()
    with ExitStack() as stack:
        if not deadly:
            stack.enter_context(InProcess(None).instead_of_children())
        pipeline = Pipeline(settings, lines=Lines(deadly))
        request = pipeline.request(Path(sys.argv[1]))
        artifact = pipeline.compile(request)
        print("cached" if artifact.cached else "compiled")
        print(f"version {pipeline.run(request).version}")
