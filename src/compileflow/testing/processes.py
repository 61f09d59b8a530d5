"""Other processes for the conformance suites: run a function in one, start several at once, kill one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any

_ENTRY = "from compileflow.testing.processes import main; main()"
_WAIT_S = 60


class OtherProcess:
    """A Python process that runs `function(*arguments)` after a call of `go`."""

    def __init__(self, function: str, *arguments: str):
        self._popen = subprocess.Popen(
            [sys.executable, "-c", _ENTRY, function, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )

    def go(self) -> None:
        """Start the function. Call `ready` first."""
        assert self._popen.stdin is not None  # noqa: S101 - __init__ opens the pipe
        self._popen.stdin.write("go\n")
        self._popen.stdin.flush()

    def ready(self) -> None:
        """Wait until the process has started and imported the function."""
        assert self.line() == "ready"  # noqa: S101 - the suites are tests

    def line(self) -> str:
        """Wait for the next line that the function prints and return it; '' after the end of the process."""
        assert self._popen.stdout is not None  # noqa: S101 - __init__ opens the pipe
        return self._popen.stdout.readline().rstrip("\n")

    def rest(self) -> list[str]:
        """Wait for the end of the process and return the remaining lines."""
        lines = self._popen.communicate(timeout=_WAIT_S)[0].splitlines()
        assert self._popen.returncode == 0, lines  # noqa: S101 - the suites are tests
        return lines

    def kill(self) -> list[str]:
        """Send SIGKILL and return the remaining complete lines."""
        self._popen.kill()
        text = self._popen.communicate(timeout=_WAIT_S)[0]
        return [line[:-1] for line in text.splitlines(keepends=True) if line.endswith("\n")]


@contextmanager
def other_process(function: str, *arguments: str) -> Iterator[OtherProcess]:
    """Give a process that runs the function. It is killed at the end of the block if it still runs."""
    process = OtherProcess(function, *arguments)
    try:
        process.ready()
        process.go()
        yield process
    finally:
        process.kill()


def at_once(function: str, *calls: tuple[str, ...]) -> list[str]:
    """Run a function in one process per tuple of arguments, all at once; return the last line of each."""
    with ExitStack() as stack:
        processes = []
        for arguments in calls:
            processes.append(OtherProcess(function, *arguments))
            stack.callback(processes[-1].kill)
        for process in processes:
            process.ready()
        for process in processes:
            process.go()
        return [process.rest()[-1] for process in processes]


def say(text: object) -> None:
    """Print a line that the parent process reads."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def resolve(path: str) -> Any:
    """Return the object that "module:attribute" names."""
    module, _, attribute = path.partition(":")
    return getattr(import_module(module), attribute)


def main() -> None:
    """Entry point of the other process."""
    function = resolve(sys.argv[1])
    say("ready")
    sys.stdin.readline()
    function(*sys.argv[2:])
