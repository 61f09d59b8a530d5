"""Fit any batch to what a graph takes: pad to a shape bucket, split what is larger, cut the answers back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compileflow.contracts import Arrays, Runner
from compileflow.errors import InputError
from compileflow.manifest import ComponentRecord
from compileflow.spec import ShapeBucket

# A bucket that is at least this full is worth padding up to; below it, smaller calls waste less.
_WORTH_FILLING = 0.75


def complete_inputs(component: ComponentRecord, given: Mapping[str, Any]) -> Arrays:
    """Turn what the caller gave into the graph's inputs, int64 arrays of shape (batch, sequence).

    A missing attention_mask means that every token counts, missing token_type_ids that all are zero, as in
    transformers.

    Raises:
        InputError: no input_ids, an input that the graph lacks, or shapes that do not go together.
    """
    names = [record.name for record in component.inputs]
    named = {name for name, value in given.items() if value is not None}
    unknown = sorted(named - set(names) - {"token_type_ids"})
    if unknown:
        raise InputError(
            f"The compiled graph has no input {unknown[0]!r}.", hint=f"Its inputs are: {', '.join(names)}."
        )
    types = given.get("token_type_ids")
    if "token_type_ids" not in names and types is not None and np.any(types):
        raise InputError(
            "The source model has one token type, and token_type_ids holds others.",
            hint=f"Leave token_type_ids out; the inputs are: {', '.join(names)}.",
        )
    if given.get("input_ids") is None:
        raise InputError("The compiled model was called without input_ids.", hint="Tokenize the text first.")
    ids = np.asarray(given["input_ids"])
    if ids.ndim != 2 or ids.size == 0 or ids.dtype.kind not in "iu":
        raise InputError(
            f"input_ids has shape {ids.shape} and type {ids.dtype}; needed is (batch, sequence) of integers.",
            hint="Call the tokenizer with return_tensors='pt' or 'np' and padding=True.",
        )
    if ids.shape[1] > component.max_sequence_length:
        raise InputError(
            f"{ids.shape[1]} tokens, and the model was compiled for at most {component.max_sequence_length}.",
            hint="Use CompiledTokenizer, which truncates, or compile with a larger max_sequence_length.",
        )
    arrays: Arrays = {}
    for name in names:
        value = given.get(name)
        if value is None:
            array = np.ones_like(ids) if name == "attention_mask" else np.zeros_like(ids)
        else:
            array = np.asarray(value)
        if array.shape != ids.shape:
            raise InputError(
                f"{name} has shape {array.shape}, input_ids has {ids.shape}.", hint="Make the shapes equal."
            )
        if array.dtype.kind not in "biu":
            raise InputError(f"{name} has type {array.dtype}; needed are integers.", hint="Convert it to int64.")
        arrays[name] = np.ascontiguousarray(array, dtype=np.int64)
    return arrays


def run_fitted(runner: Runner, component: ComponentRecord, inputs: Arrays) -> Arrays:
    """Run a graph on inputs of any batch size and any length up to its maximum.

    Args:
        runner: The loaded graph.
        component: Its record; decides whether shapes are free or buckets.
        inputs: From `complete_inputs`, each of shape (batch, sequence).

    Returns:
        Named outputs, their 'batch' and 'sequence' axes as long as the inputs'.
    """
    if component.dynamic_axes:
        return runner.run(inputs)
    rows, length = inputs["input_ids"].shape
    parts: list[Arrays] = []
    start = 0
    for bucket in plan_calls(component.shape_buckets, rows, length):
        count = min(bucket.batch_size, rows - start)
        chunk = {name: value[start : start + count] for name, value in inputs.items()}
        answer = runner.run(pad_to(chunk, bucket, component.pad_token_id))
        parts.append(_cut_back(answer, component, count, length))
        start += count
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def plan_calls(buckets: Sequence[ShapeBucket], rows: int, length: int) -> list[ShapeBucket]:
    """Choose the bucket of each call: the shortest length that fits, then batches with little padding."""
    fitting = min(b.sequence_length for b in buckets if b.sequence_length >= length)
    sizes = sorted((b for b in buckets if b.sequence_length == fitting), key=lambda b: b.batch_size)
    calls = []
    while rows > 0:
        above = next((b for b in sizes if b.batch_size >= rows), None)
        below = next((b for b in reversed(sizes) if b.batch_size <= rows), None)
        if above is not None and (below is None or rows >= _WORTH_FILLING * above.batch_size):
            chosen = above
        else:
            chosen = below or sizes[-1]
        calls.append(chosen)
        rows -= chosen.batch_size
    return calls


def pad_to(inputs: Arrays, bucket: ShapeBucket, pad_token_id: int) -> Arrays:
    """Pad on the right to a bucket's shape.

    Added tokens are masked out. Added rows repeat the last one: a row that is masked out whole makes some
    graphs divide by zero.
    """
    padded = {}
    for name, value in inputs.items():
        rows, length = value.shape
        fill = pad_token_id if name == "input_ids" else 0
        wide = np.pad(value, ((0, 0), (0, bucket.sequence_length - length)), constant_values=fill)
        padded[name] = np.pad(wide, ((0, bucket.batch_size - rows), (0, 0)), mode="edge")
    return padded


def _cut_back(answer: Arrays, component: ComponentRecord, rows: int, length: int) -> Arrays:
    sizes = {"batch": rows, "sequence": length}
    cut: dict[str, NDArray[Any]] = {}
    for record in component.outputs:
        index = tuple(slice(sizes[axis]) if isinstance(axis, str) else slice(None) for axis in record.axes)
        cut[record.name] = answer[record.name][index]
    return cut
