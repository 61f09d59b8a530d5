"""Faults in ONNX graphs: nodes and initializers that a faulty exporter or optimizer would write."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.mutation.fault import in_onnx
from benchmarks.mutation.faults.healthy import (
    CLASSIFIER,
    DECISIONS,
    EMBEDDER,
    FILLER,
    IMAGES,
    MASK,
    NUMBERS,
    PICTURES_AND_TEXTS,
    READER,
    SENTENCES,
    SOUNDS,
    SPEECH,
    TAGGER,
    TYPES,
    onnx,
)


def constant(model: Any, name: str, value: Any) -> str:
    """Add an initializer and return its name."""
    from onnx import numpy_helper

    model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name


def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> Any:
    """Return a node with one output."""
    from onnx import helper

    return helper.make_node(kind, inputs, [output], **attributes)


def before(model: Any, name: str, *nodes: Any) -> None:
    """Let all consumers of a graph input read the output of the last of some new nodes."""
    last = nodes[-1].output[0]
    for consumer in model.graph.node:
        consumer.input[:] = [last if value == name else value for value in consumer.input]
    for new in reversed(nodes):
        model.graph.node.insert(0, new)


def after(model: Any, name: str, *nodes: Any) -> None:
    """Put new nodes behind an output, which they read as "healthy"; the last one writes the output."""
    for producer in model.graph.node:
        producer.output[:] = ["healthy" if value == name else value for value in producer.output]
        producer.input[:] = ["healthy" if value == name else value for value in producer.input]
    model.graph.node.extend(nodes)


def size(model: Any, name: str, axis: int, result: str) -> list[Any]:
    """Return nodes that write the size of one axis of an input, as a vector of one number."""
    index = constant(model, f"{result}_axis", np.array([axis], np.int64))
    return [node("Shape", [name], f"{result}_shape"), node("Gather", [f"{result}_shape", index], result)]


def at_least(model: Any, name: str, axis: int, least: int, result: str) -> list[Any]:
    """Return nodes that write whether an axis of an input has at least some size."""
    limit = constant(model, f"{result}_least", np.array([least], np.int64))
    sizes = size(model, name, axis, f"{result}_size")
    return [*sizes, node("GreaterOrEqual", [f"{result}_size", limit], result)]


def negate_where(model: Any, output: str, condition: list[Any]) -> None:
    """Negate an output where the last of some nodes is true."""
    where = node("Where", [condition[-1].output[0], "negated", "healthy"], output)
    after(model, output, *condition, node("Neg", ["healthy"], "negated"), where)


@in_onnx(onnx(CLASSIFIER), *NUMBERS, kind="run time")
def batches_of_9_rows_and_more_are_wrong(model: Any) -> None:
    negate_where(model, "logits", at_least(model, "input_ids", 0, 9, "many"))


@in_onnx(onnx(CLASSIFIER), *NUMBERS, kind="run time")
def batches_of_2_beyond_256_tokens_are_wrong(model: Any) -> None:
    rows = at_least(model, "input_ids", 0, 2, "several")
    length = at_least(model, "input_ids", 1, 257, "long")
    negate_where(model, "logits", [*rows, *length, node("And", ["several", "long"], "both")])


@in_onnx(onnx(TAGGER), *NUMBERS, kind="run time")
def rows_of_65_tokens_and_more_are_wrong(model: Any) -> None:
    negate_where(model, "logits", at_least(model, "input_ids", 1, 65, "long"))


@in_onnx(onnx(EMBEDDER), *NUMBERS, kind="run time")
def rows_of_one_to_three_tokens_are_wrong(model: Any) -> None:
    more = at_least(model, "input_ids", 1, 4, "more")
    negate_where(model, "last_hidden_state", [*more, node("Not", ["more"], "few")])


def ignore_mask(model: Any) -> None:
    """Let every token count, whatever the mask says."""
    zero, one = constant(model, "zero", np.int64(0)), constant(model, "one", np.int64(1))
    before(
        model,
        "attention_mask",
        node("Mul", ["attention_mask", zero], "zeros_of_mask"),
        node("Add", ["zeros_of_mask", one], "ones_of_mask"),
    )


@in_onnx(onnx(CLASSIFIER), *MASK, *NUMBERS)
def mask_is_ignored(model: Any) -> None:
    ignore_mask(model)


@in_onnx(onnx(CLASSIFIER), *MASK, *NUMBERS, kind="run time")
def mask_is_ignored_from_129_tokens_on(model: Any) -> None:
    one = constant(model, "one", np.int64(1))
    length = at_least(model, "input_ids", 1, 129, "long")
    before(model, "attention_mask", *length, node("Where", ["long", one, "attention_mask"], "faulty_mask"))


@in_onnx(onnx(READER), *TYPES, *NUMBERS)
def token_types_are_dropped(model: Any) -> None:
    zero = constant(model, "zero", np.int64(0))
    before(model, "token_type_ids", node("Mul", ["token_type_ids", zero], "no_types"))


@in_onnx(onnx(CLASSIFIER), *DECISIONS, *NUMBERS)
def labels_are_rotated(model: Any) -> None:
    order = constant(model, "order", np.array([1, 2, 0]))
    after(model, "logits", node("Gather", ["healthy", order], "logits", axis=-1))


@in_onnx(onnx(READER), *NUMBERS, *DECISIONS)
def starts_and_ends_are_exchanged(model: Any) -> None:
    names = {"start_logits": "end_logits", "end_logits": "start_logits"}
    for producer in model.graph.node:
        producer.output[:] = [names.get(value, value) for value in producer.output]


@in_onnx(onnx(SENTENCES), *NUMBERS, "embedding_error")
def hidden_states_are_normalized_twice(model: Any) -> None:
    after(model, "last_hidden_state", node("LpNormalization", ["healthy"], "last_hidden_state", axis=-1, p=2))


@in_onnx(onnx(FILLER), *NUMBERS)
def logits_are_rounded_to_tenths(model: Any) -> None:
    ten = constant(model, "ten", np.float32(10))
    nodes = [node("Mul", ["healthy", ten], "tenfold"), node("Round", ["tenfold"], "round")]
    after(model, "logits", *nodes, node("Div", ["round", ten], "logits"))


@in_onnx(onnx(CLASSIFIER), *NUMBERS)
def logits_are_clipped_at_one(model: Any) -> None:
    limits = [constant(model, "least", np.float32(-0.5)), constant(model, "most", np.float32(0.5))]
    after(model, "logits", node("Clip", ["healthy", *limits], "logits"))


@in_onnx(onnx(EMBEDDER), *NUMBERS)
def last_token_is_read_as_the_first(model: Any) -> None:
    one = constant(model, "one", np.array([1], np.int64))
    last = constant(model, "last", np.array([-1], np.int64))
    nodes = [
        node("Slice", ["input_ids", constant(model, "begin", np.array([0], np.int64)), last, one], "head"),
        node("Slice", ["input_ids", constant(model, "start", np.array([0], np.int64)), one, one], "first"),
    ]
    before(model, "input_ids", *nodes, node("Concat", ["head", "first"], "faulty_ids", axis=1))


@in_onnx(onnx(IMAGES), *NUMBERS, kind="run time")
def second_picture_of_a_batch_answers_like_the_first(model: Any) -> None:
    several = at_least(model, "pixel_values", 0, 2, "several")
    zero = constant(model, "zero", np.array([0], np.int64))
    first = node("Gather", ["healthy", zero], "first_row", axis=0)
    after(model, "logits", *several, first, node("Where", ["several", "first_row", "healthy"], "logits"))


@in_onnx(onnx(IMAGES), *NUMBERS)
def pictures_are_mirrored(model: Any) -> None:
    columns = constant(model, "columns", np.arange(63, -1, -1))
    before(model, "pixel_values", node("Gather", ["pixel_values", columns], "mirrored", axis=3))


@in_onnx(onnx(SPEECH), *NUMBERS, *DECISIONS, kind="run time")
def recordings_beyond_two_seconds_are_wrong(model: Any) -> None:
    negate_where(model, "logits", at_least(model, "input_values", 1, 32_001, "long"))


@in_onnx(onnx(SOUNDS), *NUMBERS)
def sounds_are_clipped(model: Any) -> None:
    limits = [constant(model, "least", np.float32(-1)), constant(model, "most", np.float32(1))]
    before(model, "input_values", node("Clip", ["input_values", *limits], "clipped"))


@in_onnx(onnx(PICTURES_AND_TEXTS), *MASK, *NUMBERS)
def labels_of_pictures_lose_their_mask(model: Any) -> None:
    ignore_mask(model)


@in_onnx(onnx(PICTURES_AND_TEXTS), *DECISIONS, *NUMBERS)
def scores_are_those_of_the_next_label(model: Any) -> None:
    one = constant(model, "one", np.array([1], np.int64))
    end = constant(model, "end", np.array([2**31], np.int64))
    zero = constant(model, "begin", np.array([0], np.int64))
    nodes = [
        node("Slice", ["healthy", one, end, one], "rest"),
        node("Slice", ["healthy", zero, one, one], "first"),
    ]
    after(model, "logits_per_image", *nodes, node("Concat", ["rest", "first"], "logits_per_image", axis=1))
