"""The child that holds Neptune's client: JSON lines in, JSON lines out, one operation at a time.

The first line is the configuration; the environment is set before the client is imported, as it reads its
bounds then. Standard output is kept for answers: whatever the client prints goes to standard error.
"""

from __future__ import annotations

import io
import json
import logging
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from compileflow._process.child import skip_slow_grammar

# Each opened object leaves hooks in the process for good; after so many a new process is cheaper.
_MOST_OBJECTS = 500
# Seconds between two signs of life.
_SIGN_S = 0.1
_BLOCK = 64 * 1024


def main() -> None:
    """Entry of the child process."""
    # Of all that this process starts, nothing but this stream may answer.
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")

    configuration = json.loads(sys.stdin.buffer.readline())
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()
    try:
        session = _open_session(configuration["request_s"], lambda: answer({"alive": True}))
    except ImportError as error:
        traceback.print_exc()
        answer({"missing": str(error)})
        os._exit(0)
    answer({"ready": True})
    while session.opened < _MOST_OBJECTS:
        try:
            request = requests.get(timeout=configuration["idle_s"])
        except queue.Empty:
            break
        answer(_run(session, request))
    answer({"idle": True})
    # The client's exit hooks would wait for its queues; all that was answered has been sent.
    os._exit(0)


def _read_requests(requests: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Pass requests on, and end the process with its parent.

    A thread can do this here: the client waits for sockets, and does not hold the interpreter meanwhile.
    """
    for line in sys.stdin.buffer:
        requests.put(json.loads(line))
    os.killpg(0, signal.SIGKILL)


def _open_session(request_s: float, on_bytes: Callable[[], None]) -> Any:
    skip_slow_grammar()
    from compileflow.registries.neptune.operations import Session

    on_bytes = _now_and_then(on_bytes)
    _bound_requests(request_s, on_bytes)
    session = Session(on_bytes)
    # The client sets its own level when it is imported.
    logging.getLogger("neptune").setLevel(logging.ERROR)
    return session


def _run(session: Any, request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"value": session.run(request["operation"], request["arguments"])}
    except Exception as error:  # noqa: BLE001 - the parent gets it
        traceback.print_exc()
        return {"error": session.describe(error)}


class _Sent(io.BytesIO):
    """A body that is sent in blocks, each with a limit of its own, and says when one is fetched."""

    def __init__(self, body: bytes, on_bytes: Callable[[], None]):
        super().__init__(body)
        self._on_bytes = on_bytes

    def read(self, size: int | None = -1, /) -> bytes:
        self._on_bytes()
        return super().read(size)


def _now_and_then(call: Callable[[], None]) -> Callable[[], None]:
    next_at = 0.0

    def throttled() -> None:
        nonlocal next_at
        if time.monotonic() >= next_at:
            next_at = time.monotonic() + _SIGN_S
            call()

    return throttled


def _bound_requests(limit_s: float, on_bytes: Callable[[], None]) -> None:
    """Give every request a limit: the client itself gives none to uploads, downloads and tokens.

    The limit is that of a silence. A body of bytes would have to be sent whole within it, over a slow line, too.
    """
    from requests.adapters import HTTPAdapter

    send = HTTPAdapter.send
    bundle = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")

    def bounded(self: HTTPAdapter, request: Any, **options: Any) -> Any:
        options["timeout"] = (min(limit_s, 10.0), limit_s)
        # The client sends uploads past the place where requests itself would look at the environment.
        if options.get("verify", True) is True and bundle:
            options["verify"] = bundle
        body = request.body
        if not isinstance(body, bytes) or len(body) <= _BLOCK:
            return send(self, request, **options)
        request.body = _Sent(body, on_bytes)
        try:
            return send(self, request, **options)
        finally:
            # Whoever sends it again, after a redirect, begins at its start.
            request.body = body

    HTTPAdapter.send = bounded  # type: ignore[method-assign, assignment]
