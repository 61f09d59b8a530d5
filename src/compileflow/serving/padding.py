"""Fit any batch to what a graph takes: pad to a shape bucket, split what is larger, cut the answers back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compileflow.contracts import Arrays, ComponentRecord, Runner, TensorRecord
from compileflow.errors import InputError
from compileflow.source_model.lengths import call_sizes, frames_of, shortest_input
from compileflow.spec import ShapeBucket

# A bucket that is at least this full is worth padding up to; below it, smaller calls waste less.
_WORTH_FILLING = 0.75


def complete_inputs(component: ComponentRecord, given: Mapping[str, Any]) -> Arrays:
    """Turn what the caller gave into the graph's inputs, arrays of the axes and types that its record names.

    A missing attention_mask means that everything counts, missing token_type_ids that all are zero, as in
    transformers.

    Raises:
        InputError: no main input, an input that the graph lacks, or shapes that do not go together.
    """
    main = component.inputs[0]
    names = [record.name for record in component.inputs]
    named = {name for name, value in given.items() if value is not None}
    unknown = sorted(named - set(names) - {"token_type_ids", "attention_mask"})
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
    mask = given.get("attention_mask")
    if "attention_mask" not in names and mask is not None and not np.all(mask):
        raise InputError(
            "The source model has no attention mask, and attention_mask holds zeros.",
            hint="Give one input at a time, or inputs of one length.",
        )
    if given.get(main.name) is None:
        maker = "Tokenize the text" if main.name == "input_ids" else "Call the model's own processor"
        raise InputError(f"The compiled model was called without {main.name}.", hint=f"{maker} first.")
    first = _checked(main, given[main.name], component)
    rows, length = call_sizes(component.inputs[0], first)
    arrays: Arrays = {main.name: first}
    for record in component.inputs[1:]:
        value = given.get(record.name)
        if value is None:
            fill = 1 if record.name == "attention_mask" else 0
            array = np.full((rows, length), fill, dtype=record.dtype)
        else:
            array = _checked(record, value, component)
        wanted = tuple({"batch": rows, "sequence": length}.get(str(axis), axis) for axis in record.axes)
        if array.shape != wanted:
            raise InputError(
                f"{record.name} has shape {array.shape}, {main.name} has {first.shape}.",
                hint="Make the shapes equal.",
            )
        arrays[record.name] = array
    return arrays


def _checked(record: TensorRecord, value: Any, component: ComponentRecord) -> NDArray[Any]:
    """Return an input as an array of its type, or say what is wrong with it."""
    array = np.asarray(value)
    if record.name == "attention_mask" and array.dtype.kind == "f" and np.isin(array, (0, 1)).all():
        array = array.astype(np.int64)
    integers = record.dtype.startswith("int")
    kinds = ("biu" if record.name == "attention_mask" else "iu") if integers else "f"
    fits = array.ndim == len(record.axes) and all(
        size == axis for size, axis in zip(array.shape, record.axes, strict=False) if isinstance(axis, int)
    )
    if not fits or array.size == 0 or array.dtype.kind not in kinds:
        axes = ", ".join(map(str, record.axes))
        raise InputError(
            f"{record.name} has shape {array.shape} and type {array.dtype}; needed is ({axes}) of "
            f"{'integers' if integers else 'floats'}.",
            hint="Call the tokenizer or processor with return_tensors='pt' or 'np' and padding=True.",
        )
    if "sequence" in record.axes:
        length, longest = array.shape[record.axes.index("sequence")], component.max_sequence_length
        unit = "tokens" if record.name in ("input_ids", "token_type_ids") else "elements a row"
        if length > longest:
            raise InputError(
                f"{length} {unit}, and the model was compiled for at most {longest}.",
                hint="Truncate, as CompiledTokenizer does, or compile with a larger max_sequence_length.",
            )
        shortest = shortest_input(component.frame_convolutions)
        if length < shortest:
            raise InputError(
                f"{length} {unit}, and the model makes nothing of fewer than {shortest}.",
                hint="Give a longer recording.",
            )
    return np.ascontiguousarray(array, dtype=record.dtype)


def run_fitted(runner: Runner, component: ComponentRecord, inputs: Arrays) -> Arrays:
    """Run a graph on inputs of any batch size and any length up to its maximum.

    Args:
        runner: The loaded graph.
        component: Its record; decides whether shapes are free or buckets.
        inputs: From `complete_inputs`.

    Returns:
        Named outputs, their 'batch', 'sequence' and 'frames' axes as long as the inputs give them.
    """
    if component.dynamic_axes:
        return runner.run(inputs)
    rows, length = call_sizes(component.inputs[0], inputs[component.inputs[0].name])
    parts: list[Arrays] = []
    start = 0
    for bucket in plan_calls(component.shape_buckets, rows, length):
        count = min(bucket.batch_size, rows - start)
        chunk = {name: value[start : start + count] for name, value in inputs.items()}
        answer = runner.run(pad_to(chunk, bucket, component))
        parts.append(cut_back(answer, component, count, length))
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


def pad_to(inputs: Arrays, bucket: ShapeBucket, component: ComponentRecord) -> Arrays:
    """Pad on the right to a bucket's shape.

    Added elements are masked out. Added rows repeat the last one: a row that is masked out whole makes some
    graphs divide by zero.
    """
    sizes = {"batch": bucket.batch_size, "sequence": bucket.sequence_length}
    padded = {}
    for record in component.inputs:
        value = inputs[record.name]
        shape = tuple(sizes.get(str(axis), size) for axis, size in zip(record.axes, value.shape, strict=True))
        # torch warns of arrays that it could not write to, and gets a copy of such.
        if shape == value.shape and value.flags.writeable:
            padded[record.name] = value
            continue
        wide = np.full(shape, component.pad_token_id if record.name == "input_ids" else 0, dtype=value.dtype)
        wide[tuple(map(slice, value.shape))] = value
        wide[len(value) :] = wide[len(value) - 1]
        padded[record.name] = wide
    return padded


def cut_back(answer: Arrays, component: ComponentRecord, rows: int, length: int) -> Arrays:
    """Cut outputs of a padded call to the rows and the length that count."""
    kept = {"batch": rows, "sequence": length, "frames": frames_of(component.frame_convolutions, length)}
    cut: dict[str, NDArray[Any]] = {}
    for record in component.outputs:
        index = tuple(slice(kept[axis]) if isinstance(axis, str) else slice(None) for axis in record.axes)
        cut[record.name] = answer[record.name][index]
    return cut
