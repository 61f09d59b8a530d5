"""run_rows: answer a list of items in batches of similar length. Everything that takes lists uses it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from math import prod
from typing import Any, Generic, TypeVar

import numpy as np

from compileflow.contracts import Arrays, ComponentRecord
from compileflow.errors import InputError
from compileflow.serving.padding import split_row, stack_rows
from compileflow.source_model.lengths import call_sizes

Details = TypeVar("Details")
Answer = TypeVar("Answer")

logger = logging.getLogger(__name__)

# Rows per call of images and recordings, whose size is not counted in tokens.
DEFAULT_BATCH_SIZE = 8
# Tokens per call, with padding. On MiniLM with openvino, 1,024 tokens take 10 % less processor time than 256 at
# bf16, as much or 4 % less at fp32, and 5 % less (sentences) to 8 % more (paragraphs) at int8; 4,096 gain nothing.
# On onnx-runtime, they take 4 to 8 % more.
TOKEN_BUDGET = 1024
# What each further call costs, in tokens: 4 at fp32 to 33 at bf16, on MiniLM.
_CALL_COST = 24
# Limit of the outputs of a call with the whole budget, for logits over a large vocabulary.
_OUTPUT_BYTES = 128 * 2**20
_TOKEN_AXES = ("batch", "sequence")
# How much of a list is preprocessed and sorted at a time, whichever limit is reached first.
_WINDOW_ITEMS = 1024
_WINDOW_BYTES = 64 * 2**20
# Model types in which padding affects other tokens despite the mask, for artifacts that do not record it.
_SEE_PADDING = ("canine", "convbert", "funnel", "mobilebert", "nystromformer", "yoso")


@dataclass(frozen=True)
class PreparedItem(Generic[Details]):
    """One preprocessed item of a list.

    Attributes:
        rows: Inputs of the component, one row each, as `complete_inputs` returns them; long texts need several.
        details: Whatever `postprocess` needs besides the outputs.
    """

    rows: Sequence[Arrays]
    details: Details


def run_rows(
    model: Any,
    items: Iterable[PreparedItem[Details]],
    postprocess: Callable[[Details, list[Arrays]], Answer],
    *,
    batch_size: int | None = None,
) -> Iterator[Answer]:
    """Run the rows of all items in batches of similar length, and yield each item's answer in the items' order.

    Items are taken from `items` in windows of at most 1,024 items and about 64 MiB, so that the iterable may
    preprocess lazily.

    Args:
        model: CompiledModel.
        items: Preprocessed items.
        postprocess: Turns an item's details and the outputs of its rows, in their order, into its answer.
        batch_size: Maximum rows per call of the component. None: no limit for texts, whose calls have at most
            1,024 tokens; otherwise 8, or the size of the largest shape bucket.

    Raises:
        Exception: The first error of preprocessing or postprocessing, after the answers of the items before it.
    """
    iterator = iter(items)
    while True:
        window, error = _next_window(iterator)
        yield from _window_answers(model, window, postprocess, batch_size)
        if error is not None:
            raise error
        if not window:
            return


def run_item(
    model: Any, item: PreparedItem[Details], postprocess: Callable[[Details, list[Arrays]], Answer]
) -> Answer:
    """Run the rows of a single item and return its answer, as `run_rows` does.

    The usual item, one row, is neither planned nor stacked nor split.
    """
    if len(item.rows) == 1:
        return postprocess(item.details, [model.graph.run_completed(item.rows[0])])
    return next(run_rows(model, [item], postprocess))


def checked_batch_size(batch_size: Any) -> int | None:
    """Return a batch size unchanged if it is a positive integer or None.

    Raises:
        InputError: The batch size is something else.
    """
    if batch_size is None or (isinstance(batch_size, int) and not isinstance(batch_size, bool) and batch_size > 0):
        return batch_size
    raise InputError(f"batch_size is {batch_size!r}.", hint="Pass a positive integer, or leave it out.")


def may_pad(record: ComponentRecord, config: Any) -> bool:
    """Tell whether rows of different lengths may share a call, that is, whether padding leaves answers unchanged.

    The compile measured it. In older artifacts, it holds for tokens with a mask, unless the model has convolutions
    over the tokens or attention that reads every token.

    Args:
        record: Record of the component.
        config: Configuration of the source model.
    """
    if record.padding is not None:
        return record.padding != "none"
    has_mask = {"input_ids", "attention_mask"} <= {tensor.name for tensor in record.inputs}
    has_convolutions = bool(getattr(config, "conv_kernel_size", 0))
    return has_mask and not has_convolutions and config.model_type not in _SEE_PADDING


def plan_batches(
    record: ComponentRecord, rows: Sequence[Arrays], *, batch_size: int | None, pad: bool
) -> list[list[int]]:
    """Choose which rows share a call, the longest rows first.

    Args:
        record: Record of the component. Rows of a component with fixed shapes are grouped by their shape bucket.
        rows: Inputs of one row each, as `complete_inputs` returns them.
        batch_size: Maximum rows per call. None: as many as the token budget allows, 8 for what is not text, or as
            many as the largest shape bucket of that length holds.
        pad: Whether rows of different lengths may share a call.

    Returns:
        Positions in `rows`, each exactly once.
    """
    if len(rows) == 1:
        return [[0]]
    main = record.inputs[0]
    lengths = [call_sizes(main, row[main.name])[1] for row in rows]
    budget = _token_budget(record)

    def group_key(index: int) -> tuple[Any, ...]:
        if not pad:
            return tuple(value.shape for value in rows[index].values())
        return () if record.dynamic_axes else (_bucket_length(record, lengths[index]),)

    ordered = sorted(range(len(rows)), key=lambda index: (-lengths[index], group_key(index)))
    batches = []
    for _, indices in groupby(ordered, key=group_key):
        group = list(indices)
        if budget is None:
            limit = _rows_per_call(record, lengths[group[0]], batch_size)
            ends = [*range(limit, len(group), limit), len(group)]
        else:
            ends = _cheapest_ends([lengths[index] for index in group], batch_size or budget, budget)
        batches += [group[start:end] for start, end in pairwise((0, *ends))]
    if logger.isEnabledFor(logging.DEBUG):
        computed = sum([len(batch) * lengths[batch[0]] for batch in batches])
        padding = 1 - sum(lengths) / computed if computed else 0
        logger.debug("%d rows in %d calls, %.1f %% padding", len(rows), len(batches), 100 * padding)
    return batches


def _next_window(items: Iterator[PreparedItem[Details]]) -> tuple[list[PreparedItem[Details]], Exception | None]:
    """Take items until a limit is reached or preprocessing fails; the items before an error still get answers."""
    window: list[PreparedItem[Details]] = []
    size_bytes = 0
    try:
        for item in items:
            window.append(item)
            size_bytes += sum([value.nbytes for row in item.rows for value in row.values()])
            if len(window) >= _WINDOW_ITEMS or size_bytes >= _WINDOW_BYTES:
                break
    except Exception as error:  # noqa: BLE001 - the caller raises it
        return window, error
    return window, None


def _window_answers(
    model: Any,
    window: Sequence[PreparedItem[Details]],
    postprocess: Callable[[Details, list[Arrays]], Answer],
    batch_size: int | None,
) -> Iterator[Answer]:
    component, record = model.graph, model.graph.record
    rows = [row for item in window for row in item.rows]
    item_numbers = [number for number, item in enumerate(window) for _ in item.rows]
    row_outputs: list[dict[int, Arrays]] = [{} for _ in window]
    answers: dict[int, Answer] = {}
    errors: dict[int, Exception] = {}

    def finish(number: int) -> None:
        outputs, row_outputs[number] = row_outputs[number], {}
        try:
            answers[number] = postprocess(window[number].details, [outputs[index] for index in sorted(outputs)])
        except Exception as error:  # noqa: BLE001 - raised below, in the item's turn
            errors[number] = error

    for number, item in enumerate(window):
        if not item.rows:
            finish(number)
    for batch in plan_batches(record, rows, batch_size=batch_size, pad=may_pad(record, model.config)):
        outputs = component.run(stack_rows(record, [rows[index] for index in batch]))
        for position, index in enumerate(batch):
            number = item_numbers[index]
            row_outputs[number][index] = split_row(record, outputs, position, rows[index])
            # As early as possible, because logits over a vocabulary are large.
            if len(row_outputs[number]) == len(window[number].rows):
                finish(number)
    for number in range(len(window)):
        if number in errors:
            raise errors[number]
        yield answers.pop(number)


def _token_budget(record: ComponentRecord) -> int | None:
    """Return the most tokens per call, padding included; None where rows are limited instead."""
    is_text = all(tensor.dtype.startswith("int") and tensor.axes == _TOKEN_AXES for tensor in record.inputs)
    if not (record.dynamic_axes and is_text):
        return None
    bytes_per_token = sum(
        prod(axis for axis in tensor.axes if isinstance(axis, int)) * np.dtype(tensor.dtype).itemsize
        for tensor in record.outputs
        if "sequence" in tensor.axes
    )
    return min(TOKEN_BUDGET, _OUTPUT_BYTES // max(1, bytes_per_token))


def _cheapest_ends(lengths: Sequence[int], most_rows: int, budget: int) -> list[int]:
    """Divide rows into calls of the least padded tokens and costs of calls together; return the calls' ends.

    Args:
        lengths: Lengths of the rows, the longest first.
        most_rows: Maximum rows per call.
        budget: Maximum tokens per call, padding included; a single row may be longer.
    """
    count = len(lengths)
    # From the last row to the first: the least cost of all rows from here on, and the end of their first call.
    costs, ends = np.zeros(count + 1), [0] * count
    row_counts = np.arange(1, most_rows + 1)
    for start in range(count - 1, -1, -1):
        most = max(1, min(most_rows, budget // lengths[start], count - start))
        choices = row_counts[:most] * lengths[start] + costs[start + 1 : start + most + 1]
        # Of equal choices, the fullest call.
        rows = most - int(choices[::-1].argmin())
        costs[start], ends[start] = choices[rows - 1] + _CALL_COST, start + rows
    path = [0]
    while path[-1] < count:
        path.append(ends[path[-1]])
    return path[1:]


def _bucket_length(record: ComponentRecord, length: int) -> int:
    return min(bucket.sequence_length for bucket in record.shape_buckets if bucket.sequence_length >= length)


def _rows_per_call(record: ComponentRecord, length: int, batch_size: int | None) -> int:
    if record.dynamic_axes:
        return batch_size or DEFAULT_BATCH_SIZE
    fitting_length = _bucket_length(record, length)
    sizes = [bucket.batch_size for bucket in record.shape_buckets if bucket.sequence_length == fitting_length]
    # Even the smallest bucket computes all its rows, however few are used.
    return max((size for size in sizes if batch_size is None or size <= batch_size), default=min(sizes))
