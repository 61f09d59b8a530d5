"""The child that holds Neptune's client: one operation at a time.

The first message is the configuration. The parent sets the environment before the start, because the client reads
its limits when it is imported.
"""

from __future__ import annotations

import io
import logging
import os
import time
import traceback
from collections.abc import Callable
from typing import Any

from compileflow._process.child_process import (
    JsonObject,
    connect_to_parent,
    end_child,
    receive_from_parent,
    send_to_parent,
    skip_slow_grammar,
)

# Each opened object permanently leaves hooks in the process; after so many of them a new process is cheaper.
_MOST_OBJECTS = 500
# Seconds between two signs of life.
_SIGN_S = 0.1
_BLOCK = 64 * 1024


def main() -> None:
    """Entry point of the child process."""
    connect_to_parent()
    configuration = receive_from_parent()
    assert configuration is not None  # noqa: S101 - without a timeout it waits
    try:
        session = _open_session(configuration["request_s"], lambda: send_to_parent({"alive": True}))
    except ImportError as error:
        traceback.print_exc()
        send_to_parent({"missing": str(error)})
        end_child()
    send_to_parent({"ready": True})
    while session.opened < _MOST_OBJECTS:
        request = receive_from_parent(timeout_s=configuration["idle_s"])
        if request is None:
            break
        send_to_parent(_run(session, request))
    send_to_parent({"idle": True})
    # The client's exit hooks would wait for its queues; everything that was answered has been sent.
    end_child()


def _open_session(request_s: float, on_bytes: Callable[[], None]) -> Any:
    skip_slow_grammar()
    from compileflow.registries.neptune.client_session import Session

    on_bytes = _throttled(on_bytes)
    _bound_requests(request_s, on_bytes)
    session = Session(on_bytes)
    # The client sets its log level when it is imported.
    logging.getLogger("neptune").setLevel(logging.ERROR)
    return session


def _run(session: Any, request: JsonObject) -> JsonObject:
    try:
        return {"value": session.run(request["operation"], request["arguments"])}
    except Exception as error:  # noqa: BLE001 - the parent raises it
        traceback.print_exc()
        return {"error": session.describe(error)}


class _ReportedBody(io.BytesIO):
    """A request's body that is sent in blocks, each with its own time limit, and reports each block."""

    def __init__(self, body: bytes, on_bytes: Callable[[], None]):
        super().__init__(body)
        self._on_bytes = on_bytes

    def read(self, size: int | None = -1, /) -> bytes:
        self._on_bytes()
        return super().read(size)


def _throttled(call: Callable[[], None]) -> Callable[[], None]:
    next_at = 0.0

    def call_if_due() -> None:
        nonlocal next_at
        if time.monotonic() >= next_at:
            next_at = time.monotonic() + _SIGN_S
            call()

    return call_if_due


def _bound_requests(limit_s: float, on_bytes: Callable[[], None]) -> None:
    """Give every request a time limit: the client sets none for uploads, downloads and tokens.

    The limit applies to silence, not to the whole request. The library requests applies it to a body of bytes as a
    whole, even on a slow line, so larger bodies are sent in blocks.
    """
    from requests.adapters import HTTPAdapter

    send = HTTPAdapter.send
    bundle = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")

    def bounded(self: HTTPAdapter, request: Any, **options: Any) -> Any:
        options["timeout"] = (min(limit_s, 10.0), limit_s)
        # The client's uploads bypass the code of requests that reads the environment.
        if options.get("verify", True) is True and bundle:
            options["verify"] = bundle
        body = request.body
        if not isinstance(body, bytes) or len(body) <= _BLOCK:
            return send(self, request, **options)
        request.body = _ReportedBody(body, on_bytes)
        try:
            return send(self, request, **options)
        finally:
            # A redirect sends the body again from its start.
            request.body = body

    HTTPAdapter.send = bounded  # type: ignore[method-assign, assignment]
