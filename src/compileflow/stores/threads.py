"""run_for_all: call a function for many items, several at once."""

from __future__ import annotations

from collections.abc import Callable, MutableSequence, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_for_all(
    function: Callable[[Item], Result], items: Sequence[Item], *, at_once: int
) -> MutableSequence[Result]:
    """Call a function for all items, several at once. After an error, no further call starts."""
    pool = ThreadPoolExecutor(at_once)
    try:
        return [*pool.map(function, items)]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
