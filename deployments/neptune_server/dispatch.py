"""Which function does which operation of the API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deployments.neptune_server.calls import Call

Handler = Callable[[Call], Any]
HANDLERS: dict[str, Handler] = {}


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Make a function what an operation, or several, do."""

    def note(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return note
