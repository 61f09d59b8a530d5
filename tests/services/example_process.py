"""Starts an example of examples/ in its own process, and ends it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

FOLDER = Path(__file__).parents[2] / "examples"
WAIT_S = 120


@dataclass
class ExampleProcess:
    """A running example and its log."""

    process: subprocess.Popen[bytes]
    log: Path

    @classmethod
    @contextmanager
    def started(cls, name: str, folder: Path, variables: Mapping[str, str]) -> Iterator[Self]:
        """Start an example at a free port; kill it at the end.

        Args:
            name: File of the example.
            folder: Folder of the log and of the files that the example writes.
            variables: Environment variables.
        """
        variables = {"SERVE_PORT": "0", "COMPILEFLOW_HOME": str(folder / "home")} | dict(variables)
        log = folder / "service.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, str(FOLDER / name)],
                cwd=folder,
                env=os.environ | variables,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
            try:
                yield cls(process, log)
            finally:
                process.kill()
                process.wait(WAIT_S)

    def poll(self, look: Callable[[], Any]) -> Any:
        """Call `look` until it returns something; fail when the process has ended or time is up."""
        end = time.monotonic() + WAIT_S
        while True:
            result = look()
            if result:
                return result
            assert self.process.poll() is None, self.log.read_text("utf-8")
            assert time.monotonic() < end, self.log.read_text("utf-8")
            time.sleep(0.02)

    def url(self) -> str:
        """Return the address that the example listens on."""
        match = self.poll(
            lambda: re.search(r"(?:running on|Listening at:) (http://[\d.:]+)", self.log.read_text("utf-8"))
        )
        return str(match[1])
