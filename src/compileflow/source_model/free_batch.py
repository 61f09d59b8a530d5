"""free_batch and free_repeats: while a model is exported, its code does what it does in calls of other sizes."""

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


@contextmanager
def free_repeats() -> Iterator[None]:
    """Write `repeat_interleave` as an expansion of an axis, which every exporter keeps free.

    CANINE repeats its elements as often as the size of an axis says, and the tracing ONNX exporter would write the
    size of the example. YOSO repeats the mask for each head, and OpenVINO would run the result for one row only.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class Expand(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            arguments = kwargs or {}
            count = arguments.get("repeats", args[1] if len(args) > 1 else None)
            dim = arguments.get("dim", args[2] if len(args) > 2 else None)
            # While a model is traced, the size of an axis is a tensor without axes.
            is_number = isinstance(count, int) or (isinstance(count, torch.Tensor) and count.ndim == 0)
            is_repeat = function in (torch.repeat_interleave, torch.Tensor.repeat_interleave)
            if is_repeat and is_number and dim is not None:
                axis = dim % args[0].ndim
                sizes = [*args[0].shape[: axis + 1], count, *args[0].shape[axis + 1 :]]
                return args[0].unsqueeze(axis + 1).expand(sizes).flatten(axis, axis + 1)
            return function(*args, **arguments)

    with Expand():
        yield
