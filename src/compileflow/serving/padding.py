"""How inputs are checked, how rows and batches are padded to a shape that a component takes, and cut back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compileflow.contracts import Arrays, ComponentRecord, Runner, TensorRecord
from compileflow.errors import InputError
from compileflow.source_model.lengths import call_sizes, frames_of, shortest_input
from compileflow.spec import ShapeBucket

# Inputs that a call may leave out; a component without them accepts their neutral values.
OPTIONAL_INPUTS = ("attention_mask", "token_type_ids")
# A bucket that is at least this full is worth padding up to; below it, smaller calls waste less.
_WORTH_FILLING = 0.75
_WHOLE_AXIS = slice(None)
_TOKEN_AXES = ("batch", "sequence")


def complete_inputs(component: ComponentRecord, values: Mapping[str, Any]) -> Arrays:
    """Turn a caller's values into the component's inputs: arrays with the axes and types of its record.

    As in transformers, a missing attention_mask counts every token, and missing token_type_ids are all zero.

    Args:
        component: Record of the component.
        values: Tensors, arrays or lists by input name; None counts as missing.

    Raises:
        InputError: The main input is missing, the component does not have an input, or shapes do not match.
    """
    main = component.inputs[0]
    names = [tensor.name for tensor in component.inputs]
    arrays_by_name = {name: as_array(value) for name, value in values.items() if value is not None}
    unknown_names = [name for name in arrays_by_name if name not in names and name not in OPTIONAL_INPUTS]
    if unknown_names:
        raise InputError(
            f"The compiled model has no input {unknown_names[0]!r}.", hint=f"Its inputs are: {', '.join(names)}."
        )
    types = arrays_by_name.get("token_type_ids")
    if "token_type_ids" not in names and types is not None and np.any(types):
        raise InputError(
            "The source model has one token type, but token_type_ids contains others.",
            hint=f"Leave token_type_ids out; the inputs are: {', '.join(names)}.",
        )
    mask = arrays_by_name.get("attention_mask")
    if "attention_mask" not in names and mask is not None and not np.all(mask):
        raise InputError(
            "The source model has no attention mask, but attention_mask contains zeros.",
            hint="Pass one input at a time, or inputs of equal length.",
        )
    if main.name not in arrays_by_name:
        preparation = "Tokenize the text" if main.name == "input_ids" else "Call the model's processor"
        raise InputError(f"The compiled model was called without {main.name}.", hint=f"{preparation} first.")
    main_array = _checked(main, arrays_by_name[main.name], component)
    axis_sizes = zip(main.axes, main_array.shape, strict=True)
    sizes = {str(axis): size for axis, size in axis_sizes}
    arrays: Arrays = {main.name: main_array}
    for tensor in component.inputs[1:]:
        shape = tuple([sizes[axis] if isinstance(axis, str) else axis for axis in tensor.axes])
        if tensor.name in arrays_by_name:
            array = _checked(tensor, arrays_by_name[tensor.name], component)
        else:
            fill = 1 if tensor.name.endswith("mask") else 0
            array = np.full(shape, fill, dtype=tensor.dtype)
        if array.shape != shape:
            raise InputError(
                f"{tensor.name} has shape {array.shape}, but {main.name} has shape {main_array.shape}.",
                hint="Make the shapes equal.",
            )
        arrays[tensor.name] = array
    return arrays


def token_row(component: ComponentRecord, tokens: Mapping[str, Sequence[int]]) -> Arrays:
    """Return what `complete_inputs` returns for one row of tokens, from the lists of a tokenizer.

    Lists are checked in a fraction of the time that arrays take, and a short text has only that much.

    Args:
        component: Record of the component.
        tokens: Tokens by input name; inputs that the component does not have are left out.

    Raises:
        InputError: There are too many tokens, or an input has a number that the model does not take.
    """
    ids = tokens["input_ids"]
    length = len(ids)
    arrays = {}
    # Otherwise, they are the tokens of several texts.
    is_row = all(isinstance(token, int) for token in ids[:1])
    for tensor in component.inputs if is_row else ():
        row = tokens.get(tensor.name)
        if row is None:
            row = [1 if tensor.name.endswith("mask") else 0] * length
        else:
            below = component.vocab_size if tensor.name == "input_ids" else tensor.below
            if len(row) != length or min(row) < 0 or (below and max(row) >= below):
                break
        if tensor.axes != _TOKEN_AXES:
            break
        arrays[tensor.name] = np.array([row], dtype=tensor.dtype)
    else:
        if is_row and length <= component.max_sequence_length and not component.frame_convolutions:
            return arrays
    names = [tensor.name for tensor in component.inputs if tensor.name in tokens]
    return complete_inputs(component, {name: np.array([tokens[name]]) for name in names})


def as_array(value: Any) -> Any:
    """Return a tensor, an array or lists as an array.

    Raises:
        InputError: The tensor holds no data, or rows have different lengths.
    """
    if isinstance(value, np.ndarray):
        return value
    if hasattr(value, "detach"):
        if value.device.type == "meta":
            raise InputError("A tensor on the meta device holds no data.", hint="Create it on the CPU.")
        return value.detach().cpu().numpy()
    try:
        return np.asarray(value)
    except ValueError as error:
        raise InputError(
            "Rows of different lengths cannot form a batch.", hint="Call the tokenizer with padding=True."
        ) from error


def _checked(tensor: TensorRecord, array: NDArray[Any], component: ComponentRecord) -> NDArray[Any]:
    """Return an input with the type of its record, or raise an InputError that says what is wrong with it."""
    if tensor.name == "attention_mask" and array.dtype.kind == "f" and np.isin(array, (0, 1)).all():
        array = array.astype(np.int64)
    takes_integers = tensor.dtype.startswith("int")
    kinds = ("biu" if tensor.name == "attention_mask" else "iu") if takes_integers else "f"
    axis_sizes = zip(tensor.axes, array.shape, strict=False)
    wrong_sizes = [size for axis, size in axis_sizes if isinstance(axis, int) and size != axis]
    is_wrong_shape = array.ndim != len(tensor.axes) or wrong_sizes or array.size == 0
    if is_wrong_shape or array.dtype.kind not in kinds:
        axes = ", ".join(map(str, tensor.axes))
        raise InputError(
            f"{tensor.name}: expected {'integers' if takes_integers else 'floats'} of shape ({axes}), "
            f"got {array.dtype} of shape {array.shape}.",
            hint=_preparation(tensor, component),
        )
    if "sequence" in tensor.axes:
        length, longest = array.shape[tensor.axes.index("sequence")], component.max_sequence_length
        unit = "tokens" if tensor.name in ("input_ids", "token_type_ids") else "elements per row"
        if length > longest:
            way = "Truncate it, as CompiledTokenizer does," if unit == "tokens" else "Cut it into shorter pieces,"
            raise InputError(
                f"The input has {length} {unit}, but the model was compiled for at most {longest}.",
                hint=f"{way} or compile with a larger max_sequence_length.",
            )
        shortest = shortest_input(component.frame_convolutions)
        if length < shortest:
            raise InputError(
                f"The input has {length} {unit}, but the model needs at least {shortest}.",
                hint="Pass a longer recording.",
            )
    array = np.ascontiguousarray(array, dtype=tensor.dtype)
    count = component.vocab_size if tensor.name == "input_ids" else tensor.below
    # Native code would read beyond its table. As an unsigned number, a negative one is too large as well.
    if count and array.view(f"u{tensor.dtype}").max() >= count:
        wrong_value = array[(array < 0) | (array >= count)][0]
        raise InputError(
            f"{tensor.name} contains {wrong_value}, but the model takes numbers from 0 to {count - 1}.",
            hint="Use the tokenizer that was saved with the model. If tokens were added to it, the embeddings of "
            "the model must be resized (resize_token_embeddings).",
        )
    return array


def _preparation(tensor: TensorRecord, component: ComponentRecord) -> str:
    """Say which call prepares an input: of the tokenizer for text, of the processor for images and recordings."""
    has_rows = "sequence" in tensor.axes
    is_text = has_rows and component.inputs[0].name == "input_ids"
    padding = " and padding=True" if has_rows else ""
    return f"Call the {'tokenizer' if is_text else 'processor'} with return_tensors='pt' or 'np'{padding}."


def run_fitted(runner: Runner, component: ComponentRecord, inputs: Arrays) -> Arrays:
    """Run a component on inputs of any batch size and any length up to its maximum.

    Args:
        runner: The loaded component.
        component: Record of the component; says whether shapes are free or buckets.
        inputs: Inputs as `complete_inputs` returns them.

    Returns:
        Outputs by name. The length of their 'batch', 'sequence' and 'frames' axes follows from the inputs.
    """
    if component.dynamic_axes:
        return runner.run(inputs)
    rows, length = call_sizes(component.inputs[0], inputs[component.inputs[0].name])
    parts: list[Arrays] = []
    start = 0
    for bucket in plan_calls(component.shape_buckets, rows, length):
        count = min(bucket.batch_size, rows - start)
        chunk = take_rows(component.inputs, inputs, slice(start, start + count))
        outputs = runner.run(pad_to(chunk, bucket, component))
        parts.append(cut_back(outputs, component, count, length))
        start += count
    if len(parts) == 1:
        return parts[0]
    return join_rows(component.outputs, parts)


def take_rows(tensors: Sequence[TensorRecord], arrays: Arrays, rows: slice) -> Arrays:
    """Select rows of the batch; an input without a batch axis, such as one image for all texts, stays whole."""
    return {
        tensor.name: arrays[tensor.name][rows] if tensor.axes[0] == "batch" else arrays[tensor.name]
        for tensor in tensors
    }


def join_rows(tensors: Sequence[TensorRecord], parts: Sequence[Arrays]) -> Arrays:
    """Join the outputs of several calls along their batch axes; one without such an axis is equal in all calls."""
    return {
        tensor.name: np.concatenate([part[tensor.name] for part in parts], axis=tensor.axes.index("batch"))
        if "batch" in tensor.axes
        else parts[0][tensor.name]
        for tensor in tensors
    }


def plan_calls(buckets: Sequence[ShapeBucket], rows: int, length: int) -> list[ShapeBucket]:
    """Choose the bucket of each call: the shortest length that fits, then batches with little padding."""
    fitting_length = min(bucket.sequence_length for bucket in buckets if bucket.sequence_length >= length)
    candidates = sorted(
        (bucket for bucket in buckets if bucket.sequence_length == fitting_length),
        key=lambda bucket: bucket.batch_size,
    )
    calls = []
    while rows > 0:
        larger_bucket = next((bucket for bucket in candidates if bucket.batch_size >= rows), None)
        smaller_bucket = next((bucket for bucket in reversed(candidates) if bucket.batch_size <= rows), None)
        if larger_bucket is not None and (
            smaller_bucket is None or rows >= _WORTH_FILLING * larger_bucket.batch_size
        ):
            bucket = larger_bucket
        else:
            bucket = smaller_bucket or candidates[-1]
        calls.append(bucket)
        rows -= bucket.batch_size
    return calls


def pad_to(inputs: Arrays, bucket: ShapeBucket, component: ComponentRecord) -> Arrays:
    """Pad a batch to a bucket's shape, on the side of the component's record; without one, on the right.

    The mask excludes the added elements. Added rows repeat the last one, because a row that is masked completely
    makes some models divide by zero.
    """
    sizes = {"batch": bucket.batch_size, "sequence": bucket.sequence_length}
    arrays = {}
    for tensor in component.inputs:
        value = inputs[tensor.name]
        shape = tuple(sizes.get(str(axis), size) for axis, size in zip(tensor.axes, value.shape, strict=True))
        # torch warns about arrays that it cannot write to, so those are copied.
        if shape == value.shape and value.flags.writeable:
            arrays[tensor.name] = value
            continue
        array = np.full(shape, _fill_value(tensor, component), dtype=value.dtype)
        array[tuple(_filled_part(tensor, component, value.shape))] = value
        array[len(value) :] = array[len(value) - 1]
        arrays[tensor.name] = array
    return arrays


def stack_rows(component: ComponentRecord, rows: Sequence[Arrays]) -> Arrays:
    """Stack rows into a batch. Shorter rows are padded, and the mask excludes the padding.

    The side does not depend on the tokenizer: padding on the right keeps the absolute positions of a single row.
    Only where the component's record says so, it is the left.
    """
    arrays = {}
    for tensor in component.inputs:
        values = [row[tensor.name] for row in rows]
        if all(value.shape == values[0].shape for value in values):
            arrays[tensor.name] = np.concatenate(values)
            continue
        longest = max(value.shape[-1] for value in values)
        array = np.full((len(values), longest), _fill_value(tensor, component), dtype=values[0].dtype)
        for position, value in enumerate(values):
            array[position, _filled_part(tensor, component, value.shape)[1]] = value[0]
        arrays[tensor.name] = array
    return arrays


def split_row(component: ComponentRecord, outputs: Arrays, position: int, row: Arrays) -> Arrays:
    """Return a copy of one row's outputs from those of a batch, cut to the length of the row's inputs."""
    main = component.inputs[0]
    _, length = call_sizes(main, row[main.name])
    slices = _axis_slices(component, slice(position, position + 1), length)
    # A view would keep the whole batch in memory for as long as the caller keeps one answer.
    return {tensor.name: outputs[tensor.name][_index(tensor, slices)].copy() for tensor in component.outputs}


def cut_back(outputs: Arrays, component: ComponentRecord, rows: int, length: int) -> Arrays:
    """Cut the outputs of a padded call to the rows and the length of the inputs before padding."""
    slices = _axis_slices(component, slice(rows), length)
    return {tensor.name: outputs[tensor.name][_index(tensor, slices)] for tensor in component.outputs}


def _axis_slices(component: ComponentRecord, rows: slice, length: int) -> dict[str, slice]:
    frames = frames_of(component.frame_convolutions, length)
    sequence = slice(-length, None) if component.padding == "left" else slice(length)
    return {"batch": rows, "sequence": sequence, "frames": slice(frames)}


def _filled_part(tensor: TensorRecord, component: ComponentRecord, shape: Sequence[int]) -> list[slice]:
    """Return the place of a value with this shape in a padded array."""
    left = component.padding == "left"
    return [
        slice(-size, None) if left and axis == "sequence" else slice(size)
        for axis, size in zip(tensor.axes, shape, strict=True)
    ]


def _index(tensor: TensorRecord, slices: Mapping[str, slice]) -> tuple[slice, ...]:
    # Sizes that follow from an image or a recording are never padded.
    return tuple([slices.get(axis, _WHOLE_AXIS) if isinstance(axis, str) else _WHOLE_AXIS for axis in tensor.axes])


def _fill_value(tensor: TensorRecord, component: ComponentRecord) -> int:
    return component.pad_token_id if tensor.name == "input_ids" else 0
