"""free_batch: while a model is exported, its code keeps the batch axis, also for a batch of one row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def free_batch() -> Iterator[None]:
    """Let `squeeze` without a dimension remove only axes whose size is 1 in every call.

    MBart squeezes a column of shape (batch, 1). Its exported graph would do so at run time, and remove the batch
    axis of a single row.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class KeepFreeAxes(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            arguments = kwargs or {}
            if function in (torch.Tensor.squeeze, torch.squeeze) and len(args) == 1 and not arguments:
                # The size of a free axis is a symbol, not an integer.
                sizes = enumerate(args[0].shape)
                arguments = {"dim": tuple(axis for axis, size in sizes if type(size) is int and size == 1)}
            return function(*args, **arguments)

    with KeepFreeAxes():
        yield
