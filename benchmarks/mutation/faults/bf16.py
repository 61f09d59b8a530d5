"""Faults at bf16, where the limits follow what rounding alone does to the source model."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.mutation.fault import Healthy, in_openvino, in_weights
from benchmarks.mutation.faults.healthy import (
    CLASSIFIER,
    DECISIONS,
    EMBEDDER,
    IMAGES,
    MASK,
    NUMBERS,
    OPENVINO,
    READER,
    TAGGER,
    TORCHSCRIPT,
    TYPES,
)
from benchmarks.mutation.faults.int8 import exchange_colours, lose_the_mask_token, skip_a_layer
from benchmarks.mutation.faults.openvino_graphs import change_input, change_output, operators
from benchmarks.mutation.surgery import Weights
from compileflow.spec import Precision

EMBEDDINGS = (*NUMBERS, "embedding_error", "neighbour_overlap")


@in_openvino(Healthy(CLASSIFIER, OPENVINO, Precision.BF16), *NUMBERS, *DECISIONS, kind="bf16")
def logits_are_a_quarter_larger(model: Any) -> None:
    ops = operators()
    change_output(model, "logits", lambda healthy: ops.multiply(healthy, ops.constant(np.float32(1.25))))


@in_openvino(Healthy(CLASSIFIER, OPENVINO, Precision.BF16), *MASK, *NUMBERS, *DECISIONS, kind="bf16")
def mask_is_ignored_at_bf16(model: Any) -> None:
    ops = operators()
    change_input(model, "attention_mask", lambda mask: ops.maximum(mask, ops.constant(np.int64(1))))


@in_openvino(Healthy(READER, OPENVINO, Precision.BF16), *TYPES, *NUMBERS, *DECISIONS, kind="bf16")
def token_types_are_ignored_at_bf16(model: Any) -> None:
    ops = operators()
    change_input(model, "token_type_ids", lambda types: ops.multiply(types, ops.constant(np.int64(0))))


@in_weights(Healthy(EMBEDDER, TORCHSCRIPT, Precision.BF16), *EMBEDDINGS, kind="bf16")
def one_layer_is_skipped_at_bf16(weights: Weights) -> None:
    skip_a_layer(weights)


@in_weights(Healthy(EMBEDDER, OPENVINO, Precision.BF16), *EMBEDDINGS, kind="bf16")
def matrices_keep_three_bits(weights: Weights) -> None:
    for tensor in weights.values():
        if tensor.ndim == 2:
            step = tensor.abs().max() / 3
            tensor.copy_((tensor / step).round() * step)


@in_weights(Healthy(CLASSIFIER, TORCHSCRIPT, Precision.BF16), *NUMBERS, *DECISIONS, kind="bf16")
def one_special_token_has_a_wrong_row_at_bf16(weights: Weights) -> None:
    lose_the_mask_token(weights)


@in_weights(Healthy(TAGGER, TORCHSCRIPT, Precision.BF16), *NUMBERS, *DECISIONS, kind="bf16")
def one_tag_is_likelier_at_bf16(weights: Weights) -> None:
    weights["classifier.bias"][3] += 1


@in_weights(Healthy(IMAGES, OPENVINO, Precision.BF16), *NUMBERS, *DECISIONS, kind="bf16")
def colours_are_in_another_order_at_bf16(weights: Weights) -> None:
    exchange_colours(weights)
