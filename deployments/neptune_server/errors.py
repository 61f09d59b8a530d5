"""The errors that the server sends to a client."""

from __future__ import annotations


class ApiError(Exception):
    """An HTTP error with the JSON body that the client reads.

    Args:
        status: HTTP status.
        title: One line. The client raises NeptuneInvalidQueryException if it is "Syntax error".
        kind: Neptune's `errorType`, which the client turns into an exception of that kind.
        detail: What the client asked for, what the server has, and what to do.
    """

    def __init__(self, status: int, title: str, *, kind: str = "", detail: str = ""):
        self.status = status
        self.title = title
        self.kind = kind
        self.detail = detail
        super().__init__(status, title, detail)

    def to_json(self) -> dict[str, object]:
        """Return the body of the response."""
        body = {"code": self.status, "title": self.title, "errorType": self.kind, "detail": self.detail}
        return {name: value for name, value in body.items() if value}


class FieldError(Exception):
    """A field cannot take a value or a file; the client raises MetadataInconsistency."""


def bad_request(detail: str) -> ApiError:
    """Return the error for a request that is malformed."""
    return ApiError(400, "Bad request", detail=detail)
