"""The process of Neptune's client: started when needed, one call at a time, killed when it hangs."""

from __future__ import annotations

import atexit
import math
import os
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from compileflow._process.child_process import ChildProcess, JsonObject, Overdue, child_environment
from compileflow._process.folders import work_folder
from compileflow.registries.neptune.address import INSECURE, Token
from compileflow.settings import Settings

_ENTRY = "from compileflow.registries.neptune.client_child import main; main()"
# Importing the client takes seconds, and many more on a busy machine.
_START_S = 90.0
_IDLE_S = 60.0
_LOG_LINES, _LOG_LINE_LENGTH = 400, 500
# What a client of a server needs beside the variables of any child.
_PASSED_ON = (
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy"),
    *("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR"),
    "NEPTUNE_ALLOW_SELF_SIGNED_CERTIFICATE",
)


class Ended(Exception):  # noqa: N818 - its only caller turns it into an error of the tree
    """The process ended without an answer."""


class ClientProcess:
    """One child per token, for all callers. Threads wait for one another."""

    def __init__(self, token: Token, settings: Settings) -> None:
        self._token = token
        self._request_s = max(1, int(settings.neptune_timeout_s / 4))
        self._work_dir = settings.work_dir
        self._lock = threading.Lock()
        self._child: ChildProcess | None = None
        self._cleanup = ExitStack()
        self._log: deque[str] = deque(maxlen=_LOG_LINES)

    def ask(
        self, operation: str, arguments: Mapping[str, Any], *, timeout_s: float, limit_s: float = math.inf
    ) -> JsonObject:
        """Run an operation in the child and return its answer, an object with "value", "error" or "missing".

        Args:
            operation: Name of a `Session.do_*`.
            arguments: Arguments of the operation; JSON values.
            timeout_s: Seconds without an answer or a sign of life after which the child is killed.
            limit_s: Seconds after which it is killed in any case.

        Raises:
            Overdue: The call, or the start, ran past its deadline; the child is dead. The argument: seconds.
            Ended: The child ended without an answer.
        """
        request = {"operation": operation, "arguments": dict(arguments)}
        with self._lock:
            while True:
                if self._child is not None and not self._child.is_running():
                    # It died or stopped when idle between two calls.
                    self._stop()
                try:
                    if self._child is None:
                        greeting = self._start()
                        if "missing" in greeting:
                            self._stop()
                            return greeting
                    answer = self._exchange(request, timeout_s, limit_s)
                except BaseException:
                    # Also when the user interrupts: the state of the child is unknown.
                    self._stop()
                    raise
                if "idle" not in answer:
                    return answer
                # It stopped when idle just before it saw the request.
                self._stop()

    def log_text(self) -> str:
        """Return the last lines that the child printed, without secrets."""
        return "".join(list(self._log))

    def close(self) -> None:
        """End the child, if there is one, even during a call."""
        child = self._child
        if child is not None:
            # Before the lock, which a waiting thread would hold up to its deadline.
            child.kill()
        with self._lock:
            self._stop()

    @property
    def pid(self) -> int | None:
        """The child's process id while it runs."""
        child = self._child
        return None if child is None else child.pid

    def _start(self) -> JsonObject:
        log = self._log = deque(maxlen=_LOG_LINES)
        folder = self._cleanup.enter_context(work_folder(self._work_dir, label="neptune"))
        self._child = ChildProcess(
            _ENTRY,
            environment=_environment(self._token, str(folder), self._request_s),
            on_log=lambda line: log.append(self._token.scrub(line.decode("utf-8", "replace"))[:_LOG_LINE_LENGTH]),
        )
        return self._exchange({"request_s": self._request_s, "idle_s": _IDLE_S}, _START_S, math.inf)

    def _exchange(self, message: JsonObject, timeout_s: float, limit_s: float) -> JsonObject:
        assert self._child is not None  # noqa: S101 - the caller has started it
        start = time.monotonic()
        deadline, allowance_s = start + timeout_s, timeout_s
        try:
            self._child.send(message, deadline=deadline)
            while (answer := self._child.receive(deadline=deadline)) is not None and "alive" in answer:
                deadline, allowance_s = min((time.monotonic() + timeout_s, timeout_s), (start + limit_s, limit_s))
        except Overdue as error:
            raise Overdue(allowance_s) from error
        if answer is None:
            raise Ended
        return answer

    def _stop(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.end()
        self._cleanup.close()


def _environment(token: Token, folder: str, request_s: int) -> dict[str, str]:
    """Return the child's environment: the token and a proxy's password are its only secrets."""
    variables = {
        name: value
        for name, value in child_environment(*_PASSED_ON).items()
        if name not in ("PYTHONWARNINGS", INSECURE)
    } | {
        "NEPTUNE_API_TOKEN": token.value,
        "NEPTUNE_DATA_DIRECTORY": folder,
        # Rows of a page: for each page, a server looks for all rows.
        "NEPTUNE_FETCH_TABLE_STEP_SIZE": "1000",
        "NEPTUNE_REQUEST_TIMEOUT": str(request_s),
        "NEPTUNE_RETRIES_TIMEOUT": str(request_s),
        "NEPTUNE_SYNC_AFTER_STOP_TIMEOUT": str(request_s),
        "TMPDIR": folder,
        "PYTHONUNBUFFERED": "1",
    }
    return variables | {INSECURE: "1"} if token.allow_http else variables


_processes: dict[tuple[str, float], ClientProcess] = {}
_processes_of_parent: list[ClientProcess] = []
_processes_lock = threading.Lock()


def process_for(token: Token, settings: Settings) -> ClientProcess:
    """Return the process for a token. All users of the token share it and the first user's work folder."""
    key = (token.value, settings.neptune_timeout_s)
    with _processes_lock:
        if key not in _processes:
            _processes[key] = ClientProcess(token, settings)
        return _processes[key]


@atexit.register
def close_clients() -> None:
    """End every child; the next call starts a new one."""
    with _processes_lock:
        processes = list(_processes.values())
    for process in processes:
        process.close()


def _forget() -> None:
    """In a forked process: the children, their work folders and the locks belong to the parent."""
    global _processes_lock
    # They stay referenced, because collecting them would delete the parent's work folders.
    _processes_of_parent.extend(_processes.values())
    _processes.clear()
    _processes_lock = threading.Lock()


os.register_at_fork(after_in_child=_forget)
