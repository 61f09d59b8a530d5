"""The HTTP side: connections, routes, who may call, and answers."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from deployments.neptune_server import file_handlers, handlers  # noqa: F401 - they fill HANDLERS
from deployments.neptune_server.api import APIS, ROUTES, Operation, swagger
from deployments.neptune_server.calls import Body, Call, FileAnswer
from deployments.neptune_server.dispatch import HANDLERS
from deployments.neptune_server.errors import ApiError, FieldError, bad_request
from deployments.neptune_server.registry import Registry
from deployments.neptune_server.tokens import Tokens

logger = logging.getLogger(__name__)

_IDLE_S = 300.0
_DRAIN_S = 10.0
_SWAGGER = {f"/api/{api}/swagger.json": api for api in APIS}
_REFRESH = "/auth/realms/neptune/protocol/openid-connect/token"
# These two come before there is a session.
_WITH_API_TOKEN = ("getClientConfig", "exchangeApiToken")


class Server(ThreadingHTTPServer):
    """Serves one registry; a thread per connection.

    Args:
        address: Host and port; port 0: any that is free.
        registry: What to serve.
        tokens: Who may call; set it before `serve_forever`.
        create_projects: Make a project when it is asked for and absent.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], registry: Registry, *, create_projects: bool = False):
        super().__init__(address, _Handler)
        self.registry = registry
        self.tokens: Tokens | None = None
        self.create_projects = create_projects
        self._busy = 0
        self._changed = threading.Condition()

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Count a request, so that the server does not end in the middle of it."""
        with self._changed:
            self._busy += 1
        try:
            yield
        finally:
            with self._changed:
                self._busy -= 1
                self._changed.notify_all()

    def drain(self) -> None:
        """Wait until requests that have begun are answered, ten seconds at most."""
        with self._changed:
            self._changed.wait_for(lambda: self._busy == 0, timeout=_DRAIN_S)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Note an error outside of any request: a client that went away."""
        logger.debug("connection of %s ended", client_address[0], exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    server_version = "compileflow-registry"
    sys_version = ""
    timeout = _IDLE_S
    # A reply in one packet: otherwise each waits for the acknowledgement of its first half.
    wbufsize = -1
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """Answer a request."""
        with self.server.answering():
            self._handle()

    do_POST = do_GET  # noqa: N815 - the base class looks for it

    def finish(self) -> None:
        """Close the thread's database connection with the client's."""
        try:
            super().finish()
        finally:
            self.server.registry.database.close()

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002 - the base class's name
        """Leave it to `_handle`, which does not write queries or headers down."""

    def _handle(self) -> None:
        began = time.monotonic()
        route = urlsplit(self.path).path
        body = Body(self.rfile, 0)
        status = 200
        try:
            body = self._body()
            answer = self._answer(route, body)
            body.skip()
            if isinstance(answer, FileAnswer):
                self._send_file(answer)
            else:
                self._send(200, answer)
        except (ConnectionError, TimeoutError) as error:
            status, self.close_connection = 499, True
            logger.debug("%s %s: %s", self.command, route, error)
        except (ApiError, FieldError) as error:
            found = error if isinstance(error, ApiError) else bad_request(str(error))
            status = found.status
            self._refuse(body, found)
        except Exception:  # whatever it is, the client gets an answer and the log a trace
            status = 500
            logger.exception("%s %s failed", self.command, route)
            self._refuse(body, ApiError(500, "Internal error", detail="See the server's log."))
        logger.debug("%s %s %d %.0f ms", self.command, route, status, 1000 * (time.monotonic() - began))

    def _body(self) -> Body:
        if "Transfer-Encoding" in self.headers:
            self.close_connection = True
            raise ApiError(411, "Length required", detail="Send a Content-Length.")
        length = self.headers.get("Content-Length") or "0"
        if not length.isdecimal():
            self.close_connection = True
            raise bad_request(f"Content-Length {length!r} is no number.")
        return Body(self.rfile, int(length))

    def _answer(self, route: str, body: Body) -> Any:
        if self.command == "GET" and route in _SWAGGER:
            return swagger(_SWAGGER[route])
        if self.command == "GET" and route == "/health":
            return {"status": "ok"}
        if (self.command, route) == ("POST", _REFRESH):
            return self._refresh(body)
        operation = ROUTES.get((self.command, route))
        if operation is None:
            raise ApiError(404, "No such operation", detail=f"{self.command} {route}")
        query = parse_qs(urlsplit(self.path).query, keep_blank_values=True)
        call = Call(
            self.server.registry,
            self._tokens,
            self.server.create_projects,
            query,
            self.headers,  # type: ignore[arg-type]  # a Message, which has get()
            body,
            self._authorized(operation),
        )
        return HANDLERS[operation.name](call)

    def _authorized(self, operation: Operation) -> str:
        if operation.name in _WITH_API_TOKEN:
            return self._tokens.check_api_token(self.headers.get("X-Neptune-Api-Token"))
        return self._tokens.check_access(self.headers.get("Authorization"))

    @property
    def _tokens(self) -> Tokens:
        if self.server.tokens is None:
            raise ApiError(503, "Starting")
        return self.server.tokens

    def _refresh(self, body: Body) -> dict[str, object]:
        given = parse_qs(body.read().decode("ascii", "replace"))
        access, refresh = self._tokens.session(self._tokens.check_refresh(given.get("refresh_token", [""])[0]))
        return {"access_token": access, "refresh_token": refresh, "expires_in": 3600, "token_type": "bearer"}

    def _refuse(self, body: Body, error: ApiError) -> None:
        try:
            # An answer before the whole request has come is lost to most clients.
            body.skip()
            self._send(error.status, error.answer())
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def _send(self, status: int, answer: object) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()

    def _send_file(self, answer: FileAnswer) -> None:
        with answer.file as file:
            self.send_response(200)
            self.send_header("Content-Type", answer.media_type)
            self.send_header("Content-Length", str(os.fstat(file.fileno()).st_size))
            name = "".join(
                one if one.isascii() and one.isprintable() and one != '"' else "_" for one in answer.name
            )
            self.send_header("Content-Disposition", f'attachment; filename="{name}"')
            self.end_headers()
            self.wfile.flush()
            self.connection.sendfile(file)
