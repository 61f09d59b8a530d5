"""Faults in OpenVINO models: operators around the graph, and edited constants."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.mutation.fault import in_openvino
from benchmarks.mutation.faults.healthy import (
    CLASSIFIER,
    DECISIONS,
    EMBEDDER,
    FILLER,
    IMAGES,
    MASK,
    NUMBERS,
    READER,
    SOUNDS,
    SPEECH,
    TAGGER,
    TYPES,
    openvino,
)


def operators() -> Any:
    """Return OpenVINO's operators."""
    from openvino import opset13

    return opset13


def change_input(model: Any, name: str, change: Any) -> None:
    """Let all consumers of an input read change(input)."""
    parameter = model.input(name).node.output(0)
    consumers = list(parameter.get_target_inputs())
    changed = change(parameter)
    for consumer in consumers:
        consumer.replace_source_output(changed.output(0))


def change_output(model: Any, name: str, change: Any) -> None:
    """Replace an output by change(output)."""
    entry = model.output(name).node.input(0)
    healthy = entry.get_source_output()
    changed = change(healthy).output(0)
    healthy.get_tensor().set_names(set())
    changed.get_tensor().set_names({name})
    entry.replace_source_output(changed)


def at_least(model: Any, name: str, axis: int, least: int) -> Any:
    """Return an operator that is true where an axis of an input has at least some size."""
    ops = operators()
    shape = ops.shape_of(model.input(name).node.output(0))
    rows = ops.gather(shape, ops.constant(np.int64(axis)), ops.constant(np.int64(0)))
    return ops.greater_equal(rows, ops.constant(np.int64(least)))


def wrong_where(model: Any, name: str, condition: Any) -> None:
    """Negate an output where a condition is true."""
    ops = operators()
    change_output(model, name, lambda healthy: ops.select(condition, ops.negative(healthy), healthy))


def edit_constant(model: Any, shape: tuple[int, ...], change: Any, *, number: int = 0) -> None:
    """Replace one of the constants of a shape by change(values)."""
    ops = operators()
    constants = [
        item
        for item in model.get_ordered_ops()
        if item.get_type_name() == "Constant" and tuple(item.output(0).get_shape()) == shape
    ]
    old = constants[number].output(0)
    new = ops.constant(change(np.array(constants[number].data))).output(0)
    for consumer in list(old.get_target_inputs()):
        consumer.replace_source_output(new)


@in_openvino(openvino(CLASSIFIER), *MASK, *NUMBERS)
def attention_reads_padding(model: Any) -> None:
    ops = operators()
    one = ops.constant(np.int64(1))
    change_input(model, "attention_mask", lambda mask: ops.maximum(mask, one))


@in_openvino(openvino(CLASSIFIER), *NUMBERS, kind="run time")
def batches_of_17_rows_and_more_are_wrong(model: Any) -> None:
    wrong_where(model, "logits", at_least(model, "input_ids", 0, 17))


@in_openvino(openvino(CLASSIFIER), *NUMBERS, kind="run time")
def rows_beyond_300_tokens_are_wrong(model: Any) -> None:
    wrong_where(model, "logits", at_least(model, "input_ids", 1, 301))


@in_openvino(openvino(READER), *TYPES, *NUMBERS)
def second_texts_have_the_type_of_the_first(model: Any) -> None:
    ops = operators()
    zero = ops.constant(np.int64(0))
    change_input(model, "token_type_ids", lambda types: ops.multiply(types, zero))


@in_openvino(openvino(TAGGER), *NUMBERS, *DECISIONS)
def tags_belong_to_the_token_before(model: Any) -> None:
    ops = operators()
    one, axis = ops.constant(np.array([1], np.int64)), ops.constant(np.array([1], np.int64))
    change_output(model, "logits", lambda healthy: ops.roll(healthy, one, axis))


@in_openvino(openvino(EMBEDDER), *NUMBERS)
def hidden_states_are_off_by_a_constant(model: Any) -> None:
    ops = operators()
    change_output(model, "last_hidden_state", lambda healthy: ops.add(healthy, ops.constant(np.float32(0.01))))


@in_openvino(openvino(FILLER), *NUMBERS)
def logits_are_softmaxed_already(model: Any) -> None:
    ops = operators()
    change_output(model, "logits", lambda healthy: ops.log(ops.add(ops.softmax(healthy, 2), np.float32(1e-3))))


@in_openvino(openvino(CLASSIFIER), *NUMBERS)
def one_value_of_an_embedding_constant_is_large(model: Any) -> None:
    def change(values: Any) -> Any:
        values[20:120, 0] += 1
        return values

    edit_constant(model, (256, 32), change)


@in_openvino(openvino(IMAGES), *NUMBERS)
def position_constant_of_pictures_is_reversed(model: Any) -> None:
    edit_constant(model, (1, 17, 32), lambda values: values[:, ::-1].copy())


@in_openvino(openvino(IMAGES), *NUMBERS, kind="run time")
def batches_of_pictures_are_reversed(model: Any) -> None:
    ops = operators()
    axis = ops.constant(np.array([0], np.int64))
    one = ops.constant(np.array([1], np.int64))
    change_output(model, "logits", lambda healthy: ops.roll(healthy, one, axis))


@in_openvino(openvino(SPEECH), *NUMBERS, *DECISIONS)
def frames_are_late_by_one(model: Any) -> None:
    ops = operators()
    one, axis = ops.constant(np.array([1], np.int64)), ops.constant(np.array([1], np.int64))
    change_output(model, "logits", lambda healthy: ops.roll(healthy, one, axis))


@in_openvino(openvino(SOUNDS), *NUMBERS)
def quiet_samples_are_cut(model: Any) -> None:
    ops = operators()
    limit, zero = ops.constant(np.float32(0.1)), ops.constant(np.float32(0))
    change_input(
        model,
        "input_values",
        lambda samples: ops.select(ops.greater(ops.absolute(samples), limit), samples, zero),
    )
