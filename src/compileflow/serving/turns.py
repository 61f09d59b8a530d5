"""Turns: one thread at a time uses a tokenizer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any


class Turns:
    """Lets one thread at a time use a tokenizer.

    Truncation and padding are state of a fast tokenizer, which each call sets before it encodes. A call of another
    thread in between would change the result. Deep copies and pickles have their own tokenizer and their own lock.
    """

    def __init__(self) -> None:
        # Reentrant, because some methods call others.
        self.lock = threading.RLock()

    def guarded(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Return a method that waits for its turn."""

        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.lock:
                return method(*args, **kwargs)

        return call

    def __reduce__(self) -> tuple[Any, ...]:
        return Turns, ()
