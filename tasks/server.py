"""patiently: call Prefect's API while its server restarts."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from httpx import ConnectError

P = ParamSpec("P")
T = TypeVar("T")
_PATIENCE_S = 120.0
_POLL_S = 2.0


def patiently(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function of Prefect; if no server answers, call it again for up to two minutes.

    Prefect retries other failures itself, and this one only in a client that was connected before. Each function
    for artifacts makes a new client.
    """
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return call(*args, **kwargs)
        except ConnectError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_POLL_S)
