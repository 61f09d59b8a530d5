"""One request as the handlers see it, and what they answer besides JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from deployments.neptune_server.blobs import PIECE, Reader
from deployments.neptune_server.errors import bad_request
from deployments.neptune_server.registry import Registry
from deployments.neptune_server.tokens import Tokens

# Fields come as JSON, files never do.
_LONGEST_JSON = 64 << 20


class Body:
    """A request's body: as many bytes as were announced, read a piece at a time.

    Args:
        file: The connection.
        size: Bytes announced.
    """

    def __init__(self, file: Reader, size: int):
        self._file = file
        self.size = size
        self.left = size

    def read(self, size: int = -1, /) -> bytes:
        """Return up to `size` bytes; -1: all that is left.

        Raises:
            ConnectionAbortedError: the client went away.
        """
        wanted = self.left if size < 0 else min(size, self.left)
        piece = self._file.read(wanted)
        if len(piece) < wanted:
            raise ConnectionAbortedError(f"The client went away, {self.left - len(piece)} bytes before the end.")
        self.left -= len(piece)
        return piece

    def skip(self) -> None:
        """Read what is left and forget it."""
        while self.read(PIECE):
            pass


@dataclass(frozen=True)
class FileAnswer:
    """A file to send.

    Attributes:
        file: At its start; the server closes it.
        name: To save it under.
        media_type: For example application/zip.
    """

    file: IO[bytes]
    name: str
    media_type: str = "application/octet-stream"


@dataclass(frozen=True)
class Call:
    """One request.

    Attributes:
        registry: What there is.
        tokens: To make session tokens.
        create_projects: Make a project when it is asked for and absent.
        query: The URL's parameters.
        headers: The request's.
        body: Its body.
        url: The address by which the client reaches this server.
    """

    registry: Registry
    tokens: Tokens
    create_projects: bool
    query: Mapping[str, Sequence[str]]
    headers: Mapping[str, str]
    body: Body
    url: str

    def text(self, name: str) -> str:
        """Return a parameter.

        Raises:
            ApiError: 400, it is absent.
        """
        if name not in self.query:
            raise bad_request(f"The parameter {name!r} is absent.")
        return self.query[name][0]

    def optional(self, name: str) -> str | None:
        """Return a parameter, or None where it is absent."""
        return self.query[name][0] if name in self.query else None

    def number(self, name: str, default: int | None = None) -> int:
        """Return a parameter that is a whole number, not negative.

        Raises:
            ApiError: 400, it is absent or no such number.
        """
        text = self.text(name) if default is None else self.optional(name) or str(default)
        if not text.isdecimal():
            raise bad_request(f"The parameter {name!r} is a number, not {text!r}.")
        return int(text)

    def json(self) -> Any:
        """Return the body, which is JSON.

        Raises:
            ApiError: 400, it is not, or it is too long.
        """
        if self.body.size > _LONGEST_JSON:
            raise bad_request(f"A JSON body has at most {_LONGEST_JSON} bytes, this one {self.body.size}.")
        try:
            return json.loads(self.body.read() or b"null")
        except ValueError as error:
            raise bad_request(f"The body is no JSON: {error}.") from error

    def json_object(self) -> dict[str, Any]:
        """Return the body, which is a JSON object."""
        found = self.json() or {}
        if not isinstance(found, dict):
            raise bad_request("The body is no JSON object.")
        return found

    def json_list(self) -> list[Any]:
        """Return the body, which is a JSON list."""
        found = self.json() or []
        if not isinstance(found, list):
            raise bad_request("The body is no JSON list.")
        return found
