"""Batches of like length: which rows share a call of the graph, how they are put together, how they come apart."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np

from compileflow.contracts import Arrays, ComponentRecord
from compileflow.errors import InputError
from compileflow.serving.padding import cut_back
from compileflow.source_model.lengths import call_sizes

DEFAULT_BATCH_SIZE = 8
# Model types whose tokens see the padding in spite of the mask: they shorten or hash the sequence, or look at
# neighbours before the mask counts. Found by comparing small random models with and without padding.
_SEE_PADDING = ("canine", "convbert", "funnel", "mobilebert", "nystromformer", "yoso")


def may_pad(record: ComponentRecord, config: Any) -> bool:
    """Tell whether rows of different lengths may share a call: whether a graph's answers ignore padding.

    They do where there are tokens and a mask, and neither convolutions over the tokens nor a kind of attention
    that needs all of them.

    Args:
        record: The graph's.
        config: The source model's configuration.
    """
    masked = {"input_ids", "attention_mask"} <= {each.name for each in record.inputs}
    convolutions = bool(getattr(config, "conv_kernel_size", 0))
    return masked and not convolutions and config.model_type not in _SEE_PADDING


def checked_batch_size(asked: Any) -> int | None:
    """Return a batch size as it was asked for, None included.

    Raises:
        InputError: it is no positive integer.
    """
    if asked is None or (isinstance(asked, int) and not isinstance(asked, bool) and asked > 0):
        return asked
    raise InputError(f"batch_size is {asked!r}.", hint="Give a positive integer, or leave it out.")


def plan_batches(
    record: ComponentRecord, rows: Sequence[Arrays], *, batch_size: int | None, pad: bool
) -> list[list[int]]:
    """Choose which rows share a call, the longest first.

    Args:
        record: The graph's; fixed shapes are grouped by the shape bucket that they are padded to anyway.
        rows: Inputs of one row each, as `complete_inputs` gives them.
        batch_size: Most rows a call. None: 8, or as many as the largest shape bucket of that length holds.
        pad: Whether rows of different lengths may share a call.

    Returns:
        Positions in `rows`, each once.
    """
    main = record.inputs[0]
    lengths = [call_sizes(main, row[main.name])[1] for row in rows]

    def company(index: int) -> tuple[Any, ...]:
        if not pad:
            return tuple(value.shape for value in rows[index].values())
        return () if record.dynamic_axes else (_bucket_length(record, lengths[index]),)

    ordered = sorted(range(len(rows)), key=lambda index: (-lengths[index], company(index)))
    batches = []
    for _, together in groupby(ordered, key=company):
        group = list(together)
        limit = _rows_a_call(record, lengths[group[0]], batch_size)
        batches += [group[start : start + limit] for start in range(0, len(group), limit)]
    return batches


def stack_rows(record: ComponentRecord, rows: Sequence[Arrays]) -> Arrays:
    """Put rows together, the shorter ones padded on the right and masked out there.

    Whatever side the tokenizer pads on, this one is right: absolute positions stay those of a single row.
    """
    stacked = {}
    for tensor in record.inputs:
        values = [row[tensor.name] for row in rows]
        longest = max(value.shape[-1] for value in values)
        if all(value.shape == values[0].shape for value in values):
            stacked[tensor.name] = np.concatenate(values)
            continue
        fill = record.pad_token_id if tensor.name == "input_ids" else 0
        wide = np.full((len(values), longest), fill, dtype=values[0].dtype)
        for place, value in enumerate(values):
            wide[place, : value.shape[1]] = value[0]
        stacked[tensor.name] = wide
    return stacked


def split_row(record: ComponentRecord, answer: Arrays, place: int, row: Arrays) -> Arrays:
    """Cut one row's answer out of a batch's, as long as its input, in memory of its own."""
    main = record.inputs[0]
    single = {name: value[place : place + 1] for name, value in answer.items()}
    cut = cut_back(single, record, 1, call_sizes(main, row[main.name])[1])
    # A view would keep the whole batch in memory for as long as the caller keeps one answer.
    return {name: value.copy() for name, value in cut.items()}


def _bucket_length(record: ComponentRecord, length: int) -> int:
    return min(each.sequence_length for each in record.shape_buckets if each.sequence_length >= length)


def _rows_a_call(record: ComponentRecord, length: int, asked: int | None) -> int:
    if record.dynamic_axes:
        return asked or DEFAULT_BATCH_SIZE
    fitting = _bucket_length(record, length)
    sizes = [each.batch_size for each in record.shape_buckets if each.sequence_length == fitting]
    # The smallest bucket computes all its rows however few there are.
    return max((size for size in sizes if asked is None or size <= asked), default=min(sizes))
