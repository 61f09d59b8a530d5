"""What the server answers when it cannot do what was asked."""

from __future__ import annotations


class ApiError(Exception):
    """An HTTP error with the JSON body that the client reads.

    Args:
        status: HTTP status.
        title: One line for whoever reads it; "Syntax error" alone makes the client say that the query is wrong.
        kind: Neptune's `errorType`, which the client turns into an exception of its own.
        detail: What was found and what to do.
    """

    def __init__(self, status: int, title: str, *, kind: str = "", detail: str = ""):
        self.status = status
        self.title = title
        self.kind = kind
        self.detail = detail
        super().__init__(status, title, detail)

    def answer(self) -> dict[str, object]:
        """Return the body of the reply."""
        body = {"code": self.status, "title": self.title, "errorType": self.kind, "detail": self.detail}
        return {name: value for name, value in body.items() if value}


class FieldError(Exception):
    """One field cannot take what was written to it; the client raises it as MetadataInconsistency."""


def bad_request(detail: str) -> ApiError:
    """Return the error for a request that no client of this API makes."""
    return ApiError(400, "Bad request", detail=detail)
