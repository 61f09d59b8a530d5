"""FaultProxy: an HTTP proxy between a client and a server that loses, cuts and corrupts messages on request.

    with FaultProxy(server_url) as proxy:
        proxy.inject(CutRequest(after_bytes=1000), method="PUT", path="/blobs/", times=1)
        ...  # a client that talks to proxy.url
        assert sum(request.body_size for request in proxy.seen) < 2000

Bodies are streamed, so that memory holds one block per connection. The file is just over 300 lines long because
the faults belong to the handler that commits them.
"""

from __future__ import annotations

import http.client
import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

_BLOCK = 64 * 1024
_UPSTREAM_TIMEOUT_S = 60
# These headers describe one connection. The proxy has one on each side.
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "expect", "content-length", "proxy-connection"}


@dataclass(frozen=True)
class Answer:
    """Reply to the request without forwarding it."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CutRequest:
    """Reset the connection after this many bytes of the request's body. The server never gets the request."""

    after_bytes: int


@dataclass(frozen=True)
class CutResponse:
    """Reset the connection after this many bytes of the reply's body. Its headers announce the full length."""

    after_bytes: int


@dataclass(frozen=True)
class LoseReply:
    """Forward the request, then reset the connection instead of forwarding the reply."""


@dataclass(frozen=True)
class Hang:
    """Wait for a number of seconds, then forward the request as usual."""

    seconds: float


@dataclass(frozen=True)
class Corrupt:
    """Flip the bits of the first byte of the reply's body."""


Fault = Answer | CutRequest | CutResponse | LoseReply | Hang | Corrupt


@dataclass
class Request:
    """A request that the proxy received. `path` includes the query; `body_size` is the number of bytes so far."""

    method: str
    path: str
    body_size: int = 0


@dataclass
class _Rule:
    fault: Fault
    method: str | None
    path: str | None
    times: int
    skip: int

    def applies(self, request: Request) -> bool:
        """Say whether the fault applies to a request, and count the request."""
        if self.times == 0 or self.method not in (None, request.method) or (self.path or "") not in request.path:
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.times -= 1
        return True


class FaultProxy:
    """Forward to `upstream_url` (http://host:port) from a free port of 127.0.0.1 for the duration of the block."""

    def __init__(self, upstream_url: str):
        parts = urlsplit(upstream_url)
        self.upstream = (parts.hostname or "", parts.port or 80)
        self.seen: list[Request] = []
        self.url = ""
        self.stopped = threading.Event()
        self._rules: list[_Rule] = []
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()

    def inject(
        self, fault: Fault, *, method: str | None = None, path: str | None = None, times: int = 1, skip: int = 0
    ) -> None:
        """Commit a fault on coming requests.

        Args:
            fault: Fault to commit.
            method: HTTP method of the requests. None: any method.
            path: Text that the path or the query of the requests contains. None: any path.
            times: Number of requests with the fault.
            skip: Number of such requests that pass first.
        """
        with self._lock:
            self._rules.append(_Rule(fault, method, path, times, skip))

    def heal(self) -> None:
        """Remove all faults."""
        with self._lock:
            self._rules.clear()

    def fault_for(self, request: Request) -> Fault | None:
        """Record a request and return the fault to commit on it."""
        with self._lock:
            self.seen.append(request)
            return next((rule.fault for rule in self._rules if rule.applies(request)), None)

    def opened(self, connection: socket.socket) -> None:
        """Remember the connection of a client, which is cut at the end of the block."""
        with self._lock:
            self._connections.add(connection)

    def closed(self, connection: socket.socket) -> None:
        """Forget the connection of a client."""
        with self._lock:
            self._connections.discard(connection)

    def __enter__(self) -> FaultProxy:
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopped.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        with self._lock:
            for connection in self._connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing, because the faults make clients disconnect."""


class _Handler(BaseHTTPRequestHandler):
    proxy: FaultProxy
    protocol_version = "HTTP/1.1"
    # With Nagle's algorithm, a small reply in two writes would wait for the client's delayed acknowledgement.
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.proxy.opened(self.connection)

    def finish(self) -> None:
        self.proxy.closed(self.connection)
        super().finish()

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""

    def _pass_on(self) -> None:
        request = Request(self.command, self.path)
        fault = self.proxy.fault_for(request)
        try:
            if isinstance(fault, Hang) and self.proxy.stopped.wait(fault.seconds):
                raise ConnectionResetError("the proxy ends")
            if isinstance(fault, CutRequest):
                self._cut_request(request, fault.after_bytes)
            elif isinstance(fault, Answer):
                self._answer(request, fault)
            else:
                self._forward(request, fault)
        except (OSError, http.client.HTTPException):
            self._reset()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = do_OPTIONS = _pass_on  # noqa: N815 - http.server's names

    def _cut_request(self, request: Request, after_bytes: int) -> None:
        for _ in self._body(request, limit=after_bytes):
            pass
        raise ConnectionResetError("cut on purpose")

    def _answer(self, request: Request, answer: Answer) -> None:
        for _ in self._body(request):
            pass
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def _forward(self, request: Request, fault: Fault | None) -> None:
        # Each request gets a new connection. One that the server has closed meanwhile would be an unwanted fault.
        upstream = http.client.HTTPConnection(*self.proxy.upstream, timeout=_UPSTREAM_TIMEOUT_S)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _HOP_BY_HOP:
                    upstream.putheader(name, value)
            length, chunked = self.headers["Content-Length"], self._chunked
            if length is not None:
                upstream.putheader("Content-Length", length)
            elif chunked:
                upstream.putheader("Transfer-Encoding", "chunked")
            upstream.endheaders()
            for block in self._body(request):
                upstream.send(b"%x\r\n%b\r\n" % (len(block), block) if chunked else block)
            if chunked:
                upstream.send(b"0\r\n\r\n")
            self._reply(upstream.getresponse(), fault)
        finally:
            upstream.close()

    def _reply(self, reply: http.client.HTTPResponse, fault: Fault | None) -> None:
        if isinstance(fault, LoseReply):
            reply.read()
            raise ConnectionResetError("lost on purpose")
        length = reply.headers["Content-Length"]
        empty = self.command == "HEAD" or reply.status in (204, 304)
        self.send_response_only(reply.status, reply.reason)
        for name, value in reply.headers.items():
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        if length is not None:
            self.send_header("Content-Length", length)
        elif not empty:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if empty:
            return
        remaining = fault.after_bytes if isinstance(fault, CutResponse) else None
        spoil = isinstance(fault, Corrupt)
        while block := reply.read1(_BLOCK):
            if spoil:
                block, spoil = bytes([block[0] ^ 0xFF]) + block[1:], False
            block = block if remaining is None else block[:remaining]
            self.wfile.write(block if length is not None else b"%x\r\n%b\r\n" % (len(block), block))
            if remaining is not None and (remaining := remaining - len(block)) <= 0:
                raise ConnectionResetError("cut on purpose")
        if length is None:
            self.wfile.write(b"0\r\n\r\n")

    @property
    def _chunked(self) -> bool:
        return "chunked" in self.headers.get("Transfer-Encoding", "").lower()

    def _body(self, request: Request, *, limit: int | None = None) -> Iterator[bytes]:
        for size in self._chunk_sizes() if self._chunked else [int(self.headers["Content-Length"] or 0)]:
            remaining = size
            while remaining > 0:
                most = min(remaining, _BLOCK)
                if limit is not None:
                    most = min(most, limit - request.body_size)
                if most <= 0:
                    return
                block = self.rfile.read1(most)
                if not block:
                    raise ConnectionResetError("the client went away")
                request.body_size += len(block)
                remaining -= len(block)
                yield block

    def _chunk_sizes(self) -> Iterator[int]:
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield size
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass

    def _reset(self) -> None:
        """Close the connection so that the client sees a reset, not a normal end."""
        self.close_connection = True
        self.proxy.closed(self.connection)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # rfile and wfile count references to the socket, which would delay the close.
        os.close(self.connection.detach())
