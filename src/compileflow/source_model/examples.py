"""Example inputs with realistic values, for tracing, exporting and probing a source model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compileflow.contracts import Arrays, TensorRecord
from compileflow.source_model.token_rows import TokenRows

if TYPE_CHECKING:
    import torch


def example_inputs(
    inputs: Sequence[TensorRecord],
    batch_size: int,
    sequence_length: int,
    tokens: TokenRows | None = None,
    *,
    pad_left: bool = False,
    variant: int = 0,
) -> Arrays:
    """Generate example inputs: rows of text or noise, masks of different lengths, both token types.

    The same arguments always give the same arrays.

    Args:
        inputs: Inputs of the graph.
        batch_size: Rows of every array.
        sequence_length: Size of the sequence axis. The last row fills it; earlier rows are shorter.
        tokens: Form of the rows of a text model.
        pad_left: Pad shorter rows on the left.
        variant: Another number gives other values.
    """
    random = np.random.default_rng(20 + variant)
    shortest = min(sequence_length, tokens.shortest if tokens else 1)
    # The last row is the longest, so that at least one row is full.
    lengths = [max(shortest, sequence_length * (row + 1) // batch_size) for row in range(batch_size)]
    places = [slice(sequence_length - length, None) if pad_left else slice(length) for length in lengths]
    mask = np.zeros((batch_size, sequence_length), np.int64)
    for row, place in enumerate(places):
        mask[row, place] = 1
    values: Arrays = {}
    for record in inputs:
        if record.name == "input_ids" and tokens is not None:
            values[record.name] = np.full_like(mask, tokens.pad_token_id)
            for row, place in enumerate(places):
                values[record.name][row, place] = tokens.row(lengths[row], random)
        elif record.name == "attention_mask":
            values[record.name] = mask
        elif record.name == "token_type_ids" and tokens is not None:
            values[record.name] = np.zeros_like(mask)
            for row, place in enumerate(places):
                values[record.name][row, place] = tokens.types(lengths[row])
        else:
            has_mask = any(other.name == "attention_mask" for other in inputs)
            values[record.name] = _noise(random, record, mask, has_mask=has_mask)
    return values


def example_length(inputs: Sequence[TensorRecord], longest: int, *, chunk: int = 0) -> int:
    """Return the sequence length of the example that a graph with free axes is exported with.

    Args:
        inputs: Inputs of the graph.
        longest: Longest row that the graph must take.
        chunk: Number of tokens in each part of a row that the model reads in parts; 0 if it does not.
    """
    if "sequence" not in inputs[0].axes:
        return 1
    if chunk:
        # Two parts, because torch.export takes 1 for a constant, and the second one has fewer tokens: the model
        # fills it up. If the longest row is one part, so is the example.
        return max(2, min(chunk + chunk // 2 + 1, longest - (longest == chunk)))
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
