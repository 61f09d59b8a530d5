"""Faults at int8, where the limits are wide: compiles that have lost more than quantisation costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from benchmarks.mutation.fault import Healthy, in_onnx, in_openvino, in_weights
from benchmarks.mutation.faults.healthy import (
    CLASSIFIER,
    DECISIONS,
    EMBEDDER,
    IMAGES,
    MASK,
    NUMBERS,
    ONNX,
    OPENVINO,
    TAGGER,
)
from benchmarks.mutation.faults.onnx_graphs import after, constant, ignore_mask, node
from benchmarks.mutation.faults.openvino_graphs import change_output, operators
from benchmarks.mutation.surgery import Weights
from compileflow.spec import Precision

INT8_CLASSIFIER = Healthy(CLASSIFIER, ONNX, Precision.INT8)
INT8_EMBEDDER = Healthy(EMBEDDER, ONNX, Precision.INT8)
EMBEDDINGS = (*NUMBERS, "neighbour_overlap", "neighbour_floor", "embedding_error")


def shuffle_rows(weights: Weights) -> None:
    """Shuffle the rows of every matrix."""
    generator = torch.Generator().manual_seed(9)
    for tensor in weights.values():
        if tensor.ndim == 2:
            tensor.copy_(tensor[torch.randperm(len(tensor), generator=generator)])


def skip_a_layer(weights: Weights) -> None:
    """Let the second layer add nothing."""
    for name in weights:
        if "layer.1." in name and "output.dense" in name:
            weights[name].zero_()


def lose_the_mask_token(weights: Weights) -> None:
    """Negate the embedding of the mask token."""
    (name,) = (name for name in weights if name.endswith("word_embeddings.weight"))
    # The sources' tokenizers have five special tokens, and the mask is the last one.
    weights[name][4].neg_()


def exchange_colours(weights: Weights) -> None:
    """Let red be read as blue, and blue as red."""
    (name,) = (name for name in weights if name.endswith("patch_embeddings.projection.weight"))
    weights[name].copy_(weights[name].flip(1))


@in_onnx(INT8_CLASSIFIER, *NUMBERS, *DECISIONS, "probability_shift", kind="int8")
def logits_are_half_as_large_again(model: Any) -> None:
    factor = constant(model, "factor", np.float32(1.45))
    after(model, "logits", node("Mul", ["healthy", factor], "logits"))


@in_onnx(INT8_CLASSIFIER, *MASK, *NUMBERS, *DECISIONS, kind="int8")
def mask_is_ignored_at_int8(model: Any) -> None:
    ignore_mask(model)


@in_onnx(INT8_EMBEDDER, *EMBEDDINGS, kind="int8")
def every_text_has_the_same_embedding(model: Any) -> None:
    zero, one = constant(model, "zero", np.float32(0)), constant(model, "one", np.float32(1))
    after(
        model,
        "last_hidden_state",
        node("Mul", ["healthy", zero], "nothing"),
        node("Add", ["nothing", one], "last_hidden_state"),
    )


@in_weights(INT8_EMBEDDER, *EMBEDDINGS, kind="int8")
def matrices_are_shuffled(weights: Weights) -> None:
    shuffle_rows(weights)


@in_weights(Healthy(EMBEDDER, OPENVINO, Precision.INT8), *EMBEDDINGS, kind="int8")
def one_layer_is_skipped(weights: Weights) -> None:
    skip_a_layer(weights)


@in_weights(INT8_EMBEDDER, *EMBEDDINGS, kind="int8")
def one_special_token_has_a_wrong_row(weights: Weights) -> None:
    lose_the_mask_token(weights)


@in_weights(Healthy(CLASSIFIER, OPENVINO, Precision.INT8), *NUMBERS, *DECISIONS, kind="int8")
def one_special_token_of_a_classifier_has_a_wrong_row(weights: Weights) -> None:
    lose_the_mask_token(weights)


@in_weights(Healthy(TAGGER, OPENVINO, Precision.INT8), *NUMBERS, *DECISIONS, kind="int8")
def one_tag_is_likelier(weights: Weights) -> None:
    weights["classifier.bias"][3] += 1


@in_openvino(Healthy(CLASSIFIER, OPENVINO, Precision.INT8), *NUMBERS, *DECISIONS, "probability_shift", kind="int8")
def logits_are_a_fifth_as_large(model: Any) -> None:
    ops = operators()
    change_output(model, "logits", lambda healthy: ops.multiply(healthy, ops.constant(np.float32(0.2))))


@in_weights(Healthy(IMAGES, ONNX, Precision.INT8), *NUMBERS, *DECISIONS, kind="int8")
def colours_are_in_another_order_at_int8(weights: Weights) -> None:
    exchange_colours(weights)
