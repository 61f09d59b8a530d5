"""When ONNX Runtime gives memory back: its arena keeps what the largest call needed, unless a run shrinks it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Tokens, and numbers of pictures or sound, of all rows. A larger call takes so long that getting the memory again
# cannot be measured. A call of one short text would take noticeably longer.
_MOST_TOKENS, _MOST_NUMBERS = 1024, 2**20


def run_options(*, shrink: bool) -> Any:
    """Return the options of a run that shrinks the arena at its end, or None for other runs."""
    if not shrink:
        return None
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def is_large(inputs: Mapping[str, NDArray[Any]]) -> bool:
    """Return whether a call needs so much memory that the arena must not keep it."""
    return any(
        value.size > (_MOST_TOKENS if np.issubdtype(value.dtype, np.integer) else _MOST_NUMBERS)
        for value in inputs.values()
    )
