"""The longest row that a text model has positions for, read off a run of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Operators that look rows of a table up by their number, and where their arguments hold the numbers.
_LOOKUPS: Mapping[str, Callable[[Sequence[Any]], Any]] = {
    "aten.embedding.default": lambda arguments: arguments[1],
    "aten.index_select.default": lambda arguments: arguments[2],
    "aten.index.Tensor": lambda arguments: arguments[1][0],
}

# Model types that number positions from behind the padding token, whose number is given where it is fixed.
_BEHIND_PADDING: Mapping[str, int | None] = {"camembert": None, "mpnet": 1, "roberta": None, "xlm-roberta": None}


def longest_row(model: Any, config: Any, run: Callable[[], object], length: int) -> int | None:
    """Return the longest row that a model has positions for; None without a limit.

    A table of positions shows itself: the run looks up consecutive numbers in it, one for each token. Models
    number positions from 0, from behind the padding token, or from another offset; the first number tells.

    Args:
        model: The model.
        config: Part of the model's configuration that describes text.
        run: Runs the model on a batch whose last row is full.
        length: Length of the batch. It must differ from the number of rows.
    """
    tables = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    declared_limit = declared_longest(config)
    limits = [] if declared_limit is None else [declared_limit]
    for table, numbers in _lookups(run):
        if table.ndim == 2 and table.untyped_storage().data_ptr() in tables:
            first = _first_position(numbers, length)
            if first is not None:
                limits.append(int(table.shape[0]) - first)
    return min(limits, default=None)


def declared_longest(config: Any) -> int | None:
    """Return the longest row according to a configuration; None without a limit, which XLNet writes as -1.

    Args:
        config: Configuration of a model, or its config.json with the fields as attributes; a field may be missing.
    """
    longest = getattr(config, "max_position_embeddings", None)
    model_type = getattr(config, "model_type", "")
    if isinstance(longest, int) and model_type in _BEHIND_PADDING:
        padding = _BEHIND_PADDING[model_type]
        padding = getattr(config, "pad_token_id", None) if padding is None else padding
        longest -= padding + 1 if isinstance(padding, int) else 0
    limits = [longest]
    blocks, size = getattr(config, "num_random_blocks", None), getattr(config, "block_size", None)
    if getattr(config, "attention_type", None) == "block_sparse" and blocks is not None and size is not None:
        # Longer rows switch BigBird to another attention, which a graph of shorter rows does not have.
        limits.append((5 + 2 * blocks) * size)
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)


def _lookups(run: Callable[[], object]) -> list[tuple[Any, Any]]:
    """Return the (table, numbers) of every lookup in a run, as tensors."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    lookups: list[tuple[Any, Any]] = []

    class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if str(func) in _LOOKUPS:
                numbers = _LOOKUPS[str(func)](args)
                if isinstance(numbers, torch.Tensor) and not numbers.is_floating_point():
                    lookups.append((args[0], numbers.detach().clone()))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Recorder():  # type: ignore[no-untyped-call]
        run()
    return lookups


def _first_position(numbers: Any, length: int) -> int | None:
    """Return the number of the first position if the last row holds consecutive numbers, else None.

    Relative positions come as (length, length), which has more rows than a batch.
    """
    import torch

    if numbers.ndim == 0 or numbers.shape[-1] < length or numbers.numel() // numbers.shape[-1] >= length:
        return None
    row = numbers.reshape(-1, numbers.shape[-1])[-1][:length].long()
    first = int(row[0])
    return first if torch.equal(row, torch.arange(first, first + length)) else None
