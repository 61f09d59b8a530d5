"""Faults in weights: a model with other weights or another configuration is compiled under the source's name."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from benchmarks.mutation.answers import RARE_WORDS
from benchmarks.mutation.fault import in_config, in_weights
from benchmarks.mutation.faults.healthy import (
    CLASSIFIER,
    DECISIONS,
    EMBEDDER,
    ENGLISH_CLASSIFIER,
    FILLER,
    IMAGES,
    MASKED_SOUNDS,
    NUMBERS,
    PICTURES_AND_TEXTS,
    READER,
    SENTENCES,
    SOUNDS,
    SPEECH,
    TAGGER,
    TYPES,
    onnx,
    openvino,
    torchscript,
)
from benchmarks.mutation.sources import Source
from benchmarks.mutation.surgery import Weights
from compileflow.cli.demo import demo_model
from compileflow.spec import HfTask
from compileflow.validation.cases import load_examples

ROBERTA = Source(HfTask.TEXT_CLASSIFICATION, "roberta")
MANY_LABELS = CLASSIFIER.differing(labels=tuple(f"label {number}" for number in range(500)))


def named(weights: Weights, ending: str) -> Any:
    """Return the one tensor whose name ends so."""
    (name,) = (name for name in weights if name.endswith(ending))
    return weights[name]


def exchange(tensor: Any, first: Any, second: Any) -> None:
    """Exchange two rows, or two groups of rows, of a tensor."""
    tensor[[first, second]] = tensor[[second, first]].clone()


def perturb(tensor: Any, share: float) -> None:
    """Multiply each element with 1 and some noise."""
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
    tensor.mul_(1 + share * noise)


@cache
def english_tokenizer() -> Any:
    """Return the tokenizer of the English models."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_model())


def read_ids() -> list[int]:
    """Return the ids of the tokens in the sentences of the validation."""
    sentences = [example["text"] for example in load_examples(HfTask.TEXT_CLASSIFICATION, None, 1_000)[0]]
    return sorted({number for ids in english_tokenizer()(sentences)["input_ids"] for number in ids})


@in_weights(onnx(ROBERTA), *NUMBERS, *DECISIONS)
def positions_are_shifted_by_one(weights: Weights) -> None:
    positions = named(weights, "position_embeddings.weight")
    positions.copy_(positions.roll(1, 0))


@in_weights(torchscript(CLASSIFIER, (1, 16), (8, 64), (1, 512)), *NUMBERS)
def positions_beyond_256_are_zero(weights: Weights) -> None:
    named(weights, "position_embeddings.weight")[256:] = 0


@in_config(torchscript(EMBEDDER), *NUMBERS)
def layer_norms_have_another_epsilon(config: dict[str, Any]) -> None:
    config["layer_norm_eps"] = 1e-3


@in_config(onnx(EMBEDDER), *NUMBERS)
def gelu_is_approximated_by_tanh(config: dict[str, Any]) -> None:
    config["hidden_act"] = "gelu_pytorch_tanh"


@in_config(openvino(TAGGER), *NUMBERS)
def gelu_is_relu(config: dict[str, Any]) -> None:
    config["hidden_act"] = "relu"


@in_config(torchscript(READER), *NUMBERS)
def attention_has_half_as_many_heads(config: dict[str, Any]) -> None:
    config["num_attention_heads"] //= 2


@in_weights(openvino(CLASSIFIER), *NUMBERS)
def one_attention_head_is_zero(weights: Weights) -> None:
    named(weights, "layer.1.attention.output.dense.weight")[:, :8] = 0


@in_weights(onnx(TAGGER), *NUMBERS)
def queries_and_keys_are_exchanged(weights: Weights) -> None:
    query, key = (named(weights, f"layer.0.attention.self.{part}.weight") for part in ("query", "key"))
    query[:], key[:] = key.clone(), query.clone()


@in_weights(openvino(EMBEDDER), *NUMBERS)
def two_layers_are_exchanged(weights: Weights) -> None:
    for name in [name for name in weights if "layer.0." in name]:
        other = name.replace("layer.0.", "layer.1.")
        weights[name], weights[other] = weights[other], weights[name]


@in_weights(torchscript(EMBEDDER), *NUMBERS)
def one_matrix_is_off_by_a_hundredth(weights: Weights) -> None:
    perturb(named(weights, "layer.1.output.dense.weight"), 0.01)


@in_weights(openvino(EMBEDDER), *NUMBERS)
def one_matrix_is_off_by_a_hundred_thousandth(weights: Weights) -> None:
    perturb(named(weights, "layer.1.output.dense.weight"), 1e-5)


@in_weights(onnx(SENTENCES), *NUMBERS, "embedding_error")
def weights_are_rounded_to_bf16(weights: Weights) -> None:
    for tensor in weights.values():
        tensor.copy_(tensor.bfloat16().float())


@in_weights(openvino(READER), *TYPES, *NUMBERS)
def token_types_are_exchanged(weights: Weights) -> None:
    exchange(named(weights, "token_type_embeddings.weight"), 0, 1)


@in_weights(onnx(CLASSIFIER), *NUMBERS)
def classifier_is_of_an_earlier_epoch(weights: Weights) -> None:
    weights["classifier.weight"].add_(
        0.02 * torch.randn(weights["classifier.weight"].shape, generator=torch.Generator().manual_seed(3))
    )


@in_weights(torchscript(MANY_LABELS), *DECISIONS, *NUMBERS)
def two_rare_labels_of_500_are_exchanged(weights: Weights) -> None:
    for name in ("classifier.weight", "classifier.bias"):
        exchange(weights[name], 417, 418)


@in_weights(onnx(ENGLISH_CLASSIFIER), *NUMBERS)
def embeddings_of_eight_words_are_zero(weights: Weights) -> None:
    ids = english_tokenizer().convert_tokens_to_ids(list(RARE_WORDS))
    named(weights, "word_embeddings.weight")[ids] = 0


@in_weights(torchscript(SENTENCES), *NUMBERS)
def embeddings_of_words_that_no_built_in_sentence_contains_are_zero(weights: Weights) -> None:
    embeddings = named(weights, "word_embeddings.weight")
    unread = torch.ones(len(embeddings), dtype=torch.bool)
    unread[read_ids()] = False
    embeddings[unread] = 0


@in_weights(openvino(ENGLISH_CLASSIFIER), *NUMBERS)
def ids_beyond_16384_are_read_as_zeros(weights: Weights) -> None:
    named(weights, "word_embeddings.weight")[16_384:] = 0


@in_weights(torchscript(ENGLISH_CLASSIFIER), *NUMBERS)
def digits_1_and_7_are_exchanged(weights: Weights) -> None:
    exchange(named(weights, "word_embeddings.weight"), *english_tokenizer().convert_tokens_to_ids(["1", "7"]))


@in_weights(torchscript(FILLER), *NUMBERS)
def bias_of_one_word_is_large(weights: Weights) -> None:
    weights["cls.predictions.bias"][60] += 4


@in_weights(onnx(FILLER), *NUMBERS)
def layer_norm_of_the_head_is_left_out(weights: Weights) -> None:
    named(weights, "transform.LayerNorm.bias").fill_(0.1)


@in_weights(openvino(TAGGER), *DECISIONS, *NUMBERS)
def two_tags_are_exchanged(weights: Weights) -> None:
    for name in ("classifier.weight", "classifier.bias"):
        exchange(weights[name], 1, 2)


@in_weights(onnx(READER), *NUMBERS, *DECISIONS)
def ends_of_answers_are_biased_to_long_answers(weights: Weights) -> None:
    weights["qa_outputs.weight"][1] *= 0.5


@in_weights(onnx(IMAGES), *NUMBERS)
def colours_are_in_the_order_bgr(weights: Weights) -> None:
    patches = named(weights, "patch_embeddings.projection.weight")
    patches.copy_(patches.flip(1))


@in_weights(torchscript(IMAGES), *NUMBERS)
def patches_are_transposed(weights: Weights) -> None:
    patches = named(weights, "patch_embeddings.projection.weight")
    patches.copy_(patches.transpose(2, 3).clone())


@in_weights(openvino(IMAGES), *NUMBERS)
def first_token_of_pictures_is_zero(weights: Weights) -> None:
    weights["vit.embeddings.cls_token"].zero_()


@in_weights(onnx(SPEECH), *NUMBERS, *DECISIONS)
def blank_is_likelier(weights: Weights) -> None:
    weights["lm_head.bias"][0] += 1


@in_weights(openvino(SPEECH), *NUMBERS)
def first_convolution_is_reversed_in_time(weights: Weights) -> None:
    kernel = weights["wav2vec2.feature_extractor.conv_layers.0.conv.weight"]
    kernel.copy_(kernel.flip(-1))


@in_weights(torchscript(MASKED_SOUNDS), *NUMBERS, *DECISIONS)
def classes_of_sounds_are_exchanged(weights: Weights) -> None:
    for name in ("classifier.weight", "classifier.bias"):
        exchange(weights[name], 0, 2)


@in_weights(openvino(SOUNDS), *NUMBERS)
def projector_loses_its_bias(weights: Weights) -> None:
    weights["projector.bias"].add_(0.2)


@in_weights(onnx(PICTURES_AND_TEXTS), *NUMBERS)
def temperature_of_scores_is_halved(weights: Weights) -> None:
    weights["logit_scale"].sub_(0.7)


@in_weights(openvino(PICTURES_AND_TEXTS), *NUMBERS)
def text_projection_is_transposed(weights: Weights) -> None:
    projection = weights["text_projection.weight"]
    projection.copy_(projection.T.clone())
