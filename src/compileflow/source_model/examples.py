"""Example inputs with realistic values, for tracing, exporting and probing a source model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compileflow.contracts import Arrays, TensorRecord

if TYPE_CHECKING:
    import torch


def example_inputs(
    inputs: Sequence[TensorRecord], batch_size: int, sequence_length: int, vocab_size: int, pad_token_id: int
) -> Arrays:
    """Generate example inputs: varied tokens or noise, masks of different lengths, both token types.

    The same arguments always give the same arrays.

    Args:
        inputs: Inputs of the graph.
        batch_size: Rows of every array.
        sequence_length: Size of the sequence axis. The last row fills it; earlier rows are shorter.
        vocab_size: Token ids are drawn below this number.
        pad_token_id: Token id beyond the end of a row.
    """
    random = np.random.default_rng(20)
    mask = np.ones((batch_size, sequence_length), np.int64)
    for row in range(batch_size):
        # The last row is the longest, so that at least one row is full.
        row_length = max(1, sequence_length * (row + 1) // batch_size) if batch_size > 1 else sequence_length
        mask[row, row_length:] = 0
    values: Arrays = {}
    for record in inputs:
        if record.name == "input_ids":
            ids = random.integers(0, vocab_size, (batch_size, sequence_length), dtype=np.int64)
            values[record.name] = np.where(mask == 1, ids, pad_token_id)
        elif record.name == "attention_mask":
            values[record.name] = mask
        elif record.name == "token_type_ids":
            second_type = np.arange(sequence_length) >= sequence_length // 2
            values[record.name] = second_type.astype(np.int64) * mask
        else:
            has_mask = any(other.name == "attention_mask" for other in inputs)
            values[record.name] = _noise(random, record, mask, has_mask=has_mask)
    return values


def example_length(inputs: Sequence[TensorRecord], longest: int) -> int:
    """Return the sequence length of the example that a graph with free axes is exported with."""
    if "sequence" not in inputs[0].axes:
        return 1
    # Text: one sentence. Audio: at most one second. At least 2, because torch.export takes 1 for a constant.
    return max(2, min(16 if inputs[0].name == "input_ids" else 16_000, longest))


def calibration_tensors(
    inputs: Sequence[TensorRecord], batches: Sequence[Arrays]
) -> list[dict[str, torch.Tensor]]:
    """Return calibration batches as tensors; transformers' exporters silently drop NumPy arrays."""
    import torch

    return [{record.name: torch.as_tensor(batch[record.name]) for record in inputs} for batch in batches]


def _noise(
    random: np.random.Generator, record: TensorRecord, mask: NDArray[Any], *, has_mask: bool
) -> NDArray[Any]:
    rows, length = mask.shape
    sizes = {"batch": rows, "sequence": length}
    shape = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in record.axes)
    values = random.standard_normal(shape, dtype=np.float32)
    if has_mask and "sequence" in record.axes:
        values *= mask.reshape([sizes[axis] if axis in ("batch", "sequence") else 1 for axis in record.axes])
    return values
