"""A request as the API's functions see it, and the file that a response may be."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from deployments.neptune_server.blobs import BLOCK_BYTES, Reader
from deployments.neptune_server.errors import bad_request
from deployments.neptune_server.registry import Registry
from deployments.neptune_server.tokens import Tokens

# SQLite's whole numbers end after 18 digits and a bit.
_MAX_DIGITS = 18
# Fields come as JSON, files never do.
_MAX_JSON_BYTES = 64 << 20


class Body:
    """The body of a request, read block by block.

    Args:
        file: The connection.
        size: Number of bytes that the request announces.
    """

    def __init__(self, file: Reader, size: int):
        self._file = file
        self.size = size
        self._remaining = size

    def read(self, size: int = -1, /) -> bytes:
        """Return up to `size` bytes, or all remaining bytes if `size` is -1.

        Raises:
            ConnectionAbortedError: The client closed the connection before the end.
        """
        count = self._remaining if size < 0 else min(size, self._remaining)
        block = self._file.read(count)
        if len(block) < count:
            missing = self._remaining - len(block)
            raise ConnectionAbortedError(f"The client closed the connection {missing} bytes before the end.")
        self._remaining -= len(block)
        return block

    def skip(self) -> None:
        """Read the remaining bytes and discard them."""
        while self.read(BLOCK_BYTES):
            pass


@dataclass(frozen=True)
class FileResponse:
    """A response that is a file.

    Attributes:
        file: The open file, at its start; the server closes it.
        name: Name under which the client saves the file.
    """

    file: IO[bytes]
    name: str


@dataclass(frozen=True)
class Call:
    """One request.

    Attributes:
        registry: The registry that the server serves.
        tokens: Creates session tokens.
        query: Parameters in the URL.
        headers: Headers of the request.
        body: Body of the request.
        url: Address by which the client reaches this server.
    """

    registry: Registry
    tokens: Tokens
    query: Mapping[str, Sequence[str]]
    headers: Mapping[str, str]
    body: Body
    url: str

    @property
    def db(self) -> sqlite3.Connection:
        """This thread's database connection, for reading."""
        return self.registry.database.reading

    def text(self, name: str) -> str:
        """Return a parameter.

        Raises:
            ApiError: 400, the request does not have the parameter.
        """
        if name not in self.query:
            raise bad_request(f"The request has no parameter {name!r}.")
        return self.query[name][0]

    def texts(self, name: str) -> Sequence[str]:
        """Return all values of a parameter that may be repeated."""
        return self.query.get(name, ())

    def optional(self, name: str) -> str | None:
        """Return a parameter, or None if the request does not have it."""
        return self.query[name][0] if name in self.query else None

    def number(self, name: str) -> int:
        """Return a parameter that is a whole number and not negative.

        Raises:
            ApiError: 400, the request does not have the parameter, or it is not such a number.
        """
        text = self.text(name)
        if not (text.isdecimal() and len(text) <= _MAX_DIGITS):
            raise bad_request(f"Parameter {name!r}: expected a number, got {text!r}.")
        return int(text)

    def json_object(self) -> dict[str, Any]:
        """Return the body, a JSON object.

        Raises:
            ApiError: 400, the body is not a JSON object, or it is too long.
        """
        value = self._json() or {}
        if not isinstance(value, dict):
            raise bad_request(f"Body: expected a JSON object, got {type(value).__name__}.")
        return value

    def json_list(self) -> list[Any]:
        """Return the body, a JSON list.

        Raises:
            ApiError: 400, the body is not a JSON list, or it is too long.
        """
        value = self._json() or []
        if not isinstance(value, list):
            raise bad_request(f"Body: expected a JSON list, got {type(value).__name__}.")
        return value

    def _json(self) -> Any:
        if self.body.size > _MAX_JSON_BYTES:
            raise bad_request(f"Body: expected at most {_MAX_JSON_BYTES} bytes of JSON, got {self.body.size}.")
        try:
            return json.loads(self.body.read() or b"null")
        except (ValueError, RecursionError) as error:
            raise bad_request(f"Body: expected JSON: {error}.") from error
