"""The HTTP side of the server: connections, routes, authorization and responses."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from deployments.neptune_server.api import ARTIFACTS, BACKEND, LEADERBOARD, OPERATIONS
from deployments.neptune_server.calls import Body, Call, FileResponse
from deployments.neptune_server.errors import ApiError, FieldError, bad_request
from deployments.neptune_server.registry import Registry
from deployments.neptune_server.swagger import API_TOKEN_HEADER, Operation, swagger
from deployments.neptune_server.tokens import Tokens

logger = logging.getLogger(__name__)

_IDLE_S = 300.0
_DRAIN_S = 10.0
_SWAGGER = {
    "/api/backend/swagger.json": BACKEND,
    "/api/leaderboard/swagger.json": LEADERBOARD,
    "/api/artifacts/swagger.json": ARTIFACTS,
}
# A refresh token has about 300 bytes.
_MAX_FORM_BYTES = 16 << 10
_MAX_DIGITS = 18
# What a handler raises for a body whose parts have other types or sizes than the client sends.
_MALFORMED = (
    *(ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError),
    *(sqlite3.InterfaceError, sqlite3.ProgrammingError, sqlite3.DataError),
)
_REFRESH = "/auth/realms/neptune/protocol/openid-connect/token"


class Server(ThreadingHTTPServer):
    """Serves a registry with one thread per connection.

    Args:
        address: Host and port; port 0 means any free port.
        registry: The registry to serve.

    Attributes:
        tokens: Checks who may call. Set it before `serve_forever`.
    """

    daemon_threads = True
    request_queue_size = 128
    tokens: Tokens

    def __init__(self, address: tuple[str, int], registry: Registry):
        super().__init__(address, _Handler)
        self.registry = registry
        self._busy = 0
        self._changed = threading.Condition()

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Count a request while the server answers it."""
        with self._changed:
            self._busy += 1
        try:
            yield
        finally:
            with self._changed:
                self._busy -= 1
                self._changed.notify_all()

    def drain(self) -> None:
        """Wait until all requests in progress are answered, for ten seconds at most."""
        with self._changed:
            self._changed.wait_for(lambda: self._busy == 0, timeout=_DRAIN_S)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log an error outside a request: the client closed the connection."""
        logger.debug("connection of %s ended", client_address[0], exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    server_version = "compileflow-registry"
    sys_version = ""
    timeout = _IDLE_S
    # Send a response in one packet: a second packet would wait until the first is acknowledged.
    wbufsize = -1
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """Answer a request."""
        with self.server.answering():
            self._handle()

    do_POST = do_GET  # noqa: N815 - the base class looks for this name

    def finish(self) -> None:
        """Close the thread's database connection together with the client's connection."""
        try:
            super().finish()
        finally:
            self.server.registry.database.close()

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002 - the base class's name
        """Log nothing here: the base class logs parameters; `_handle` does not."""

    def _handle(self) -> None:
        start = time.monotonic()
        path = urlsplit(self.path).path
        body = Body(self.rfile, 0)
        status = 200
        try:
            body = self._body()
            response = self._respond(path, body)
            body.skip()
            if isinstance(response, FileResponse):
                self._send_file(response)
            else:
                self._send(200, response)
        except (ConnectionError, TimeoutError) as error:
            status, self.close_connection = 499, True
            logger.debug("%s %s: %s", self.command, path, error)
        except (ApiError, FieldError) as error:
            api_error = error if isinstance(error, ApiError) else bad_request(str(error))
            status = api_error.status
            self._refuse(body, api_error)
        except _MALFORMED as error:
            status = 400
            logger.info("%s %s was refused", self.command, path, exc_info=True)
            detail = f"The request is malformed: {type(error).__name__}."
            self._refuse(body, ApiError(400, "Bad request", detail=detail))
        except Exception:  # the client gets a response, and the log gets the traceback
            status = 500
            logger.exception("%s %s failed", self.command, path)
            self._refuse(body, ApiError(500, "Internal error", detail="See the server's log."))
        logger.debug("%s %s %d %.0f ms", self.command, path, status, 1000 * (time.monotonic() - start))

    def _body(self) -> Body:
        if "Transfer-Encoding" in self.headers:
            self.close_connection = True
            raise ApiError(411, "Length required", detail="Send a Content-Length instead of a Transfer-Encoding.")
        length = self.headers.get("Content-Length") or "0"
        if not (length.isascii() and length.isdecimal() and len(length) <= _MAX_DIGITS):
            self.close_connection = True
            raise bad_request(f"Content-Length: expected a number, got {length!r}.")
        return Body(self.rfile, int(length))

    def _respond(self, path: str, body: Body) -> Any:
        if self.command == "GET" and path in _SWAGGER:
            prefix = _SWAGGER[path]
            return swagger(operation for operation in OPERATIONS.values() if operation.path.startswith(prefix))
        if (self.command, path) == ("GET", "/health"):
            return {"status": "ok"}
        if (self.command, path) == ("POST", _REFRESH):
            return self._refresh(body)
        operation = OPERATIONS.get((self.command, path))
        if operation is None:
            raise ApiError(404, "Unknown operation", detail=f"The API has no {self.command} {path}.")
        call = Call(
            registry=self.server.registry,
            tokens=self.server.tokens,
            query=parse_qs(urlsplit(self.path).query, keep_blank_values=True),
            headers=self.headers,  # type: ignore[arg-type]  # a Message, which has get()
            body=body,
            url=self._authorize(operation),
        )
        return operation.handler(call)

    def _authorize(self, operation: Operation) -> str:
        """Check the token of a request and return the server's address in it."""
        if API_TOKEN_HEADER in operation.parameters:
            return self.server.tokens.check_api_token(self.headers.get(API_TOKEN_HEADER))
        return self.server.tokens.check_access(self.headers.get("Authorization"))

    def _refresh(self, body: Body) -> dict[str, object]:
        if body.size > _MAX_FORM_BYTES:
            detail = f"Expected a form of at most {_MAX_FORM_BYTES} bytes, got {body.size}."
            raise ApiError(413, "Content too large", detail=detail)
        form = parse_qs(body.read().decode("ascii", "replace"))
        url = self.server.tokens.check_refresh(form.get("refresh_token", [""])[0])
        access, refresh = self.server.tokens.session(url)
        return {"access_token": access, "refresh_token": refresh, "expires_in": 3600, "token_type": "bearer"}

    def _refuse(self, body: Body, error: ApiError) -> None:
        try:
            # Most clients lose a response that arrives before they have sent the whole request.
            body.skip()
            self._send(error.status, error.to_json())
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def _send(self, status: int, response: object) -> None:
        data = json.dumps(response).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()

    def _send_file(self, response: FileResponse) -> None:
        with response.file as file:
            self.send_response(200)
            self.send_header("Content-Type", "application/octet-stream")
            self.send_header("Content-Length", str(os.fstat(file.fileno()).st_size))
            name = "".join(
                character if character.isascii() and character.isprintable() and character != '"' else "_"
                for character in response.name
            )
            self.send_header("Content-Disposition", f'attachment; filename="{name}"')
            self.end_headers()
            self.wfile.flush()
            self.connection.sendfile(file)
