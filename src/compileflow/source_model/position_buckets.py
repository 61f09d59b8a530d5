"""tabulated_buckets: while a model is exported, it looks the buckets of relative positions up in a table."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

# Functions of transformers from relative positions to buckets, which grow with the logarithm of the distance.
_FUNCTIONS = ("_relative_position_bucket", "relative_position_bucket", "make_log_bucket_position")
# Largest distance in a table. Rows of audio samples are longer, but their frames are few.
_MOST = 2**16


@contextmanager
def tabulated_buckets(model: Any, longest: int) -> Iterator[None]:
    """Let a model look up the bucket of each relative position in a table.

    A runtime for bf16 would compute the logarithms in bf16, which puts many positions in wrong buckets. The table
    follows from constants, so that the exporter computes it.

    Args:
        model: The transformers model.
        longest: Longest row of the graph.
    """
    layers = {type(module) for module in model.modules()}
    holders = [*layers, *{sys.modules[layer.__module__] for layer in layers}]
    originals = [
        (holder, name, vars(holder)[name]) for holder in holders for name in _FUNCTIONS if name in vars(holder)
    ]
    try:
        for holder, name, original in originals:
            if isinstance(original, staticmethod):
                setattr(holder, name, staticmethod(_tabulated(original.__func__, longest)))
            else:
                setattr(holder, name, _tabulated(original, longest))
        yield
    finally:
        for holder, name, original in originals:
            setattr(holder, name, original)


def _tabulated(function: Callable[..., Any], longest: int) -> Callable[..., Any]:
    import torch

    signature = inspect.signature(function)

    @wraps(function)
    def look_up(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        name = next(name for name in call.arguments if name.startswith("relative_pos"))
        # Beyond `max_distance`, all positions have one bucket.
        farthest = call.arguments.get("max_distance", longest)
        if farthest > _MOST:
            return function(*args, **kwargs)
        positions = call.arguments[name]
        call.arguments[name] = torch.arange(-farthest, farthest + 1, device=positions.device)
        table = function(*call.args, **call.kwargs).to(torch.long)
        return table[positions.clamp(-farthest, farthest).to(torch.long) + farthest]

    return look_up
