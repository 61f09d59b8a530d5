"""When ONNX Runtime gives memory back: its arena keeps what the largest call needed, unless a run shrinks it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

# Tokens, and numbers of pictures or sound, of all rows in a call that is not large.
_MOST_TOKENS, _MOST_NUMBERS = 1024, 2**20
# Shrinking after each large call took a fifth of the time of calls of 32 x 128 tokens.
_SMALL_CALLS = 2


class Arena:
    """Chooses the runs of a session that shrink its arena: the second small call after a large one.

    While large calls go on, they keep their memory.
    """

    def __init__(self) -> None:
        self._is_full = False
        self._small_calls = 0

    def run_options(self, inputs: Mapping[str, NDArray[Any]]) -> Any:
        """Return the options of a run with these inputs; None for a run that shrinks nothing."""
        if _is_large(inputs):
            self._is_full, self._small_calls = True, 0
        elif self._is_full:
            self._small_calls += 1
            if self._small_calls >= _SMALL_CALLS:
                self._is_full = False
                return _shrinking()
        return None


def _shrinking() -> Any:
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def _is_large(inputs: Mapping[str, NDArray[Any]]) -> bool:
    return any(
        value.size > _MOST_TOKENS and (value.dtype.kind in "iu" or value.size > _MOST_NUMBERS)
        for value in inputs.values()
    )
