"""The client's process as its user sees it: started when needed, asked one thing at a time, killed if it hangs."""

from __future__ import annotations

import atexit
import json
import logging
import math
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from compileflow._process.folders import work_folder
from compileflow.registries.neptune.address import INSECURE, Token
from compileflow.settings import Settings

logger = logging.getLogger(__name__)

_ENTRY = "from compileflow.registries.neptune.worker import main; main()"
# Importing the client takes seconds, on a busy machine many.
_START_S = 90.0
_IDLE_S = 60.0
_LOG_LINES, _LOG_LINE_LENGTH = 400, 500
_SECRETS = ("TOKEN", "SECRET", "PASSW", "_KEY", "CREDENTIAL", "AUTH", "DATABASE")
_KEPT = ("NEPTUNE_ALLOW_SELF_SIGNED_CERTIFICATE",)


class Overdue(Exception):  # noqa: N818 - turned into an error of the tree by its only caller
    """A call, or the start, ran past its deadline; the process is dead. The argument: seconds."""


class Ended(Exception):  # noqa: N818 - turned into an error of the tree by its only caller
    """The process ended without an answer."""


class ClientProcess:
    """One child for one token, whoever calls. Threads wait for one another."""

    def __init__(self, token: Token, settings: Settings) -> None:
        self._token = token
        self._timeout_s = settings.neptune_timeout_s
        self._work_dir = settings.work_dir
        self._lock = threading.Lock()
        self._child: _Child | None = None
        self._last_log = ""

    def ask(
        self, operation: str, arguments: Mapping[str, Any], *, timeout_s: float, most_s: float = math.inf
    ) -> dict[str, Any]:
        """Let the child do an operation and return its answer, an object with "value", "error" or "missing".

        Args:
            operation: Name of a `Session.do_*`.
            arguments: For it; JSON values.
            timeout_s: Seconds without an answer or a sign of life after which the child is killed.
            most_s: Seconds after which it is killed whatever it says.

        Raises:
            Overdue, Ended: there is no answer, and no child any more.
        """
        with self._lock:
            while True:
                if self._child is not None and self._child.popen.poll() is not None:
                    # It died, or stopped for want of work, between two calls.
                    self._stop()
                child = self._child or self._start()
                if "missing" in child.greeting:
                    self._stop()
                    return child.greeting
                try:
                    answer = child.ask({"operation": operation, "arguments": dict(arguments)}, timeout_s, most_s)
                except BaseException:
                    # Also when the user interrupts: what the child is at is unknown.
                    self._stop()
                    raise
                if "idle" not in answer:
                    return answer
                # It stopped for want of work just before it saw the request.
                self._stop()

    def log_text(self) -> str:
        """Return the last of what the child printed, without secrets."""
        child = self._child
        return child.log_text() if child is not None else self._last_log

    def close(self) -> None:
        """End the child, if there is one, whatever it is at."""
        child = self._child
        if child is not None:
            # Before the lock, which a thread that waits for an answer would keep up to its bound.
            child.kill()
        with self._lock:
            self._stop()

    def _start(self) -> _Child:
        request_s = max(1, int(self._timeout_s / 4))
        child = _Child(self._token, self._work_dir, request_s)
        self._child = child
        try:
            child.greeting = child.wait(_START_S)
        except BaseException:
            self._stop()
            raise
        return child

    def _stop(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.end()
            self._last_log = child.log_text()

    @property
    def pid(self) -> int | None:
        """The child's process id, while there is one."""
        return self._child.popen.pid if self._child is not None else None


class _Child:
    """A running child: its pipes, its work folder, and the last lines that it printed."""

    greeting: dict[str, Any]

    def __init__(self, token: Token, work_dir: Path, request_s: int) -> None:
        self._token = token
        self._stack = ExitStack()
        folder = self._stack.enter_context(work_folder(work_dir, label="neptune"))
        self._answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._log: deque[str] = deque(maxlen=_LOG_LINES)
        try:
            self.popen = subprocess.Popen(
                [sys.executable, "-P", "-c", _ENTRY],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=_environment(token, folder, request_s),
                start_new_session=True,
            )
        except BaseException:
            self._stack.close()
            raise
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._read, self._read_log)]
        for reader in self._readers:
            reader.start()
        self._send({"request_s": request_s, "idle_s": _IDLE_S}, _START_S)

    def ask(self, request: dict[str, Any], timeout_s: float, most_s: float) -> dict[str, Any]:
        self._send(request, timeout_s)
        return self.wait(timeout_s, most_s)

    def wait(self, timeout_s: float, most_s: float = math.inf) -> dict[str, Any]:
        last = time.monotonic() + most_s
        limit_s, until = timeout_s, time.monotonic() + timeout_s
        while True:
            try:
                answer = self._answers.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty as error:
                raise Overdue(limit_s) from error
            if "ended" in answer:
                raise Ended
            if "alive" not in answer:
                return answer
            limit_s, until = min((timeout_s, time.monotonic() + timeout_s), (most_s, last), key=lambda one: one[1])

    def kill(self) -> None:
        """Kill the child and all that it started."""
        # Not by a number that may be another process's by now.
        if self.popen.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.popen.pid, signal.SIGKILL)

    def end(self) -> None:
        """Kill the child, wait for it, and clear its folder away."""
        self.kill()
        self.popen.wait()
        for reader in self._readers:
            reader.join(timeout=2)
        for pipe in (self.popen.stdin, self.popen.stdout, self.popen.stderr):
            with suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
        self._stack.close()

    def log_text(self) -> str:
        return "".join(list(self._log))

    def _send(self, value: dict[str, Any], timeout_s: float) -> None:
        """Write a line to the child; one that does not read would otherwise hold its writer for ever."""
        assert self.popen.stdin is not None  # noqa: S101 - a pipe was asked for
        pipe = self.popen.stdin.fileno()
        ready = select.poll()
        ready.register(pipe, select.POLLOUT)
        left = json.dumps(value).encode() + b"\n"
        until = time.monotonic() + timeout_s
        try:
            while left:
                if not ready.poll(1000 * max(0.0, until - time.monotonic())):
                    raise Overdue(timeout_s)
                # No more than surely fits.
                left = left[os.write(pipe, left[: select.PIPE_BUF]) :]
        except BrokenPipeError:
            logger.debug("the Neptune client ended before it was asked")

    def _read(self) -> None:
        assert self.popen.stdout is not None  # noqa: S101 - a pipe was asked for
        for line in self.popen.stdout:
            with suppress(ValueError):
                self._answers.put(json.loads(line))
        self._answers.put({"ended": True})

    def _read_log(self) -> None:
        assert self.popen.stderr is not None  # noqa: S101 - a pipe was asked for
        for line in self.popen.stderr:
            self._log.append(self._token.scrub(line.decode("utf-8", "replace"))[:_LOG_LINE_LENGTH])


def _environment(token: Token, folder: Path, request_s: int) -> dict[str, str]:
    """Return what the child may know: of all secrets the token alone, and of Neptune's settings only ours."""
    kept = {name: value for name, value in os.environ.items() if name in _KEPT or not _is_dropped(name)}
    ours = {
        "NEPTUNE_API_TOKEN": token.value,
        "NEPTUNE_DATA_DIRECTORY": str(folder),
        "NEPTUNE_REQUEST_TIMEOUT": str(request_s),
        "NEPTUNE_RETRIES_TIMEOUT": str(request_s),
        "NEPTUNE_SYNC_AFTER_STOP_TIMEOUT": str(request_s),
        "TMPDIR": str(folder),
        "PYTHONUNBUFFERED": "1",
    }
    return kept | ours | ({INSECURE: "1"} if token.allow_http else {})


def _is_dropped(name: str) -> bool:
    secret = any(word in name.upper() for word in _SECRETS)
    return secret or name.startswith("NEPTUNE_") or name in ("PYTHONWARNINGS", INSECURE)


_processes: dict[tuple[str, float], ClientProcess] = {}
_parents: list[ClientProcess] = []
_changing = threading.Lock()


def process_for(token: Token, settings: Settings) -> ClientProcess:
    """Return the child for a token. All that use the token share it, and the first one's work folder."""
    key = (token.value, settings.neptune_timeout_s)
    with _changing:
        if key not in _processes:
            _processes[key] = ClientProcess(token, settings)
        return _processes[key]


@atexit.register
def close_clients() -> None:
    """End every child; the next call starts a new one."""
    with _changing:
        found = list(_processes.values())
    for process in found:
        process.close()


def _forget() -> None:
    """In a forked process: the children, their work folders and the locks are the parent's."""
    global _changing
    # Kept, as what is collected would clean up after itself.
    _parents.extend(_processes.values())
    _processes.clear()
    _changing = threading.Lock()


os.register_at_fork(after_in_child=_forget)
