"""Inputs that look real, for tracing, exporting and probing a source model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compileflow.contracts import Arrays, ComponentPlan, TensorRecord

if TYPE_CHECKING:
    import torch

    from compileflow.source_model.interface import SourceModel


def example_inputs(
    inputs: Sequence[TensorRecord], batch_size: int, sequence_length: int, vocab_size: int, pad_token_id: int
) -> Arrays:
    """Make inputs that look real: varied tokens or noise, ragged masks, both token types. Always the same."""
    random = np.random.default_rng(20)
    mask = np.ones((batch_size, sequence_length), np.int64)
    for row in range(batch_size):
        # The last row is the longest, so that one row at least is full.
        keep = max(1, sequence_length * (row + 1) // batch_size) if batch_size > 1 else sequence_length
        mask[row, keep:] = 0
    values: Arrays = {}
    for record in inputs:
        if record.name == "input_ids":
            ids = random.integers(0, vocab_size, (batch_size, sequence_length), dtype=np.int64)
            values[record.name] = np.where(mask == 1, ids, pad_token_id)
        elif record.name == "attention_mask":
            values[record.name] = mask
        elif record.name == "token_type_ids":
            second = np.arange(sequence_length) >= sequence_length // 2
            values[record.name] = second.astype(np.int64) * mask
        else:
            values[record.name] = _noise(
                random, record, mask, masked=any(r.name == "attention_mask" for r in inputs)
            )
    return values


def example_length(inputs: Sequence[TensorRecord], longest: int) -> int:
    """Return the length of the inputs that a graph with free axes is exported with."""
    if "sequence" not in inputs[0].axes:
        return 1
    # Of audio a second at most, of text a sentence.
    return min(16 if inputs[0].name == "input_ids" else 16_000, longest)


def calibration_tensors(graph: SourceModel, plan: ComponentPlan) -> list[dict[str, torch.Tensor]]:
    """Return a plan's calibration batches as tensors: transformers' exporters drop arrays without a word."""
    import torch

    return [
        {record.name: torch.as_tensor(batch[record.name]) for record in graph.inputs} for batch in plan.calibration
    ]


def _noise(random: np.random.Generator, record: TensorRecord, mask: NDArray[Any], *, masked: bool) -> NDArray[Any]:
    rows, length = mask.shape
    sizes = {"batch": rows, "sequence": length}
    shape = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in record.axes)
    values = random.standard_normal(shape, dtype=np.float32)
    if masked and "sequence" in record.axes:
        values *= mask.reshape([sizes[a] if a in ("batch", "sequence") else 1 for a in record.axes])
    return values
