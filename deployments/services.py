"""Service: a program that runs as long as this process, with a log file and everything that it starts."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from compileflow._process.folders import os_errors
from compileflow.errors import ProcessError

# The program replaces this interpreter. Its watcher ends it when this process ends, even by SIGKILL.
_ENTRY = (
    "import os, sys; from compileflow._process.child_process import end_with_parent; end_with_parent(); "
    "os.execvp(sys.argv[1], sys.argv[1:])"
)
_STOP_S = 15.0
_POLL_S = 0.2
_LAST_LINES = 15


class Service:
    """A program in a session of its own, so that Ctrl-C in the terminal reaches only this process.

    Args:
        name: Name for messages.
        words: Program and arguments.
        environment: The program's whole environment.
        log_path: File for everything that the program prints.
        stop_signal: Signal that asks the program to end.
        runs_flows: Whether the program is a worker, whose children are flow runs.
    """

    def __init__(
        self,
        name: str,
        words: Sequence[str],
        *,
        environment: Mapping[str, str],
        log_path: Path,
        stop_signal: signal.Signals = signal.SIGTERM,
        runs_flows: bool = False,
    ) -> None:
        self.name = name
        self.log_path = log_path
        self._stop_signal = stop_signal
        self._runs_flows = runs_flows
        self._started_at = time.monotonic()
        with os_errors(log_path, "write"), log_path.open("ab") as log:
            self._popen = subprocess.Popen(
                [sys.executable, "-P", "-c", _ENTRY, *words],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Number of the program's process."""
        return self._popen.pid

    @property
    def age_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started_at

    def has_ended(self) -> bool:
        """Return whether the program has ended."""
        return self._popen.poll() is not None

    def check_running(self) -> None:
        """Raise ProcessError, with the end of the log, if the program has ended."""
        code = self._popen.poll()
        if code is not None:
            lines = self.log_path.read_text("utf-8", "replace").splitlines()[-_LAST_LINES:]
            sys.stderr.write("".join(f"  {line}\n" for line in lines))
            raise ProcessError(f"The {self.name} ended with exit code {code}.", log_path=str(self.log_path))

    def wait_until(self, is_ready: Callable[[], bool], *, timeout_s: float) -> None:
        """Wait until the program is ready.

        Raises:
            ProcessError: The program ended, or it is not ready in time.
        """
        deadline = time.monotonic() + timeout_s
        while not is_ready():
            self.check_running()
            if time.monotonic() > deadline:
                raise ProcessError(
                    f"The {self.name} did not answer within {timeout_s:.0f} seconds.",
                    hint="Start it again when the machine is less busy.",
                    log_path=str(self.log_path),
                )
            time.sleep(_POLL_S)

    def stop(self) -> None:
        """End the program, and kill all that it has started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self._popen.pid)
            descendants = process.children(recursive=True)
            # A flow run reports its crash while worker and server run. Unlike the watcher, it leads a session.
            flow_runs = [child for child in process.children() if self._runs_flows and _leads_session(child)]
            for flow_run in flow_runs:
                with contextlib.suppress(psutil.NoSuchProcess):
                    flow_run.terminate()
            psutil.wait_procs(flow_runs, timeout=_STOP_S)
            self._popen.send_signal(self._stop_signal)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(timeout=_STOP_S)
            # psutil leaves a process alone that has got the number of one that ended.
            for descendant in descendants:
                with contextlib.suppress(psutil.NoSuchProcess):
                    descendant.kill()
        self._popen.kill()
        self._popen.wait()
        if self._popen.stdin is not None:
            self._popen.stdin.close()


def _leads_session(process: psutil.Process) -> bool:
    try:
        return os.getsid(process.pid) == int(process.pid)
    except ProcessLookupError:
        return False
