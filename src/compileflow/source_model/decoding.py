"""Decoders: the positions of their tokens beside padding, and one step of a decoder with its cache as a graph."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compileflow.errors import CompileError, SourceError
from compileflow.source_model.examples import example_inputs
from compileflow.source_model.token_rows import text_config

if TYPE_CHECKING:
    from compileflow.source_model.interface import SourceModel

CACHE = "past_key_values"
# Name in transformers of the tokens whose logits a decoder computes.
LOGITS_PLACES = "logits_to_keep"
OTHER_DECODER = "Choose a decoder of another family; docs/reference/decoders.md lists those that compile."
# Kinds of layers, as transformers names them, whose cache is a state of fixed size.
_STATE_LAYERS = ("conv", "hybrid", "hybrid_sliding", "linear_attention")
# Model types whose answers in transformers no single graph gives, with the reason.
_REFUSED: Mapping[str, str] = {
    "git": "masks the tokens after a prompt as if an image stood before them, and text-generation gives no image",
    "moshi": "reads a prompt whole, and later its sliding window alone, so its answers depend on the prompt's end",
}
# Inputs of a decoder that reads text alone.
_TOKEN_INPUTS = ("input_ids", "attention_mask", "position_ids")
# Rows and tokens of the example: torch.export takes a size of 1 for a constant.
_ROWS, _TOKENS = 3, 6


@dataclass(frozen=True)
class DecodingStep:
    """A decoder that reads the next tokens of rows, with a cache of the earlier ones.

    An empty cache makes it read rows from their beginning, so one graph serves both.

    Attributes:
        model: The transformers model, as the exporters take it.
        inputs: Example inputs by name; some rows are padded, and the cache is not empty.
        dynamic_shapes: Free axes of the inputs, as torch.export takes them.
    """

    model: Any
    inputs: Mapping[str, Any]
    dynamic_shapes: Mapping[str, Any]


def token_positions(attention_mask: NDArray[Any]) -> NDArray[np.int64]:
    """Return the position of each token in its row without padding, as transformers' `generate` numbers them.

    Args:
        attention_mask: 0 for padding, 1 for tokens that count, of shape (rows, tokens).
    """
    return np.maximum(np.cumsum(attention_mask, axis=-1, dtype=np.int64) - 1, 0)


def refuse_decoder(config: Any, class_name: str, *, is_stateful: bool) -> None:
    """Refuse a decoder of a family that no graph serves, or whose cache is not keys and values of each token.

    Args:
        config: Configuration of the model, or its config.json with the fields as attributes.
        class_name: Class of the model.
        is_stateful: Whether transformers says so of the class, whatever its layers are.

    Raises:
        SourceError: The decoder carries a state from token to token, or its family is refused.
    """
    reason = _REFUSED.get(getattr(config, "model_type", ""))
    if reason:
        raise SourceError(f"{class_name} {reason}.", hint=OTHER_DECODER)
    layer_types = getattr(text_config(config), "layer_types", None) or ()
    if is_stateful or set(_STATE_LAYERS) & set(layer_types):
        raise SourceError(
            f"{class_name} carries a state from token to token, and text-generation compiles decoders that keep "
            "the keys and values of each token.",
            hint=OTHER_DECODER,
        )


def lost_cache(class_name: str) -> CompileError:
    """Return the error for an exported graph that reads a cache, and does not return it with the next tokens."""
    return CompileError(
        f"The exported graph of {class_name} does not return its cache, so the model cannot go on from it.",
        hint=OTHER_DECODER,
    )


def decoding_step(source_model: SourceModel, *, chooses_logits: bool = False) -> DecodingStep:
    """Return one step of a decoder with an example of its inputs, taken from transformers' own `generate`.

    Args:
        source_model: The decoder.
        chooses_logits: Add the input LOGITS_PLACES, the tokens whose logits are computed, if the decoder has it.

    Raises:
        RuntimeError: transformers cannot generate with the model.
        CompileError: The decoder has no cache, or does not read text alone.
    """
    import torch
    from transformers import GenerationConfig
    from transformers.exporters.utils import decompose_prefill_decode, get_leaf_tensors

    # Padding in some rows keeps the mask in the graph.
    arrays = example_inputs(source_model.inputs, _ROWS, _TOKENS, source_model.tokens, pad_left=True)
    settings = GenerationConfig(use_cache=True, do_sample=False, pad_token_id=source_model.pad_token_id)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stages = decompose_prefill_decode(
            source_model.model,
            {name: torch.as_tensor(value) for name, value in arrays.items()},
            generation_config=settings,
            multi_token_decode=True,
        )
    model, inputs = stages["decode"]
    class_name = type(source_model.model).__name__
    parameters = inspect.signature(source_model.model.forward).parameters
    # Some classes leave settings of `generate` among the inputs, and the inputs that they do not get.
    inputs = {name: value for name, value in inputs.items() if name in parameters and value is not None}
    if CACHE not in inputs:
        raise CompileError(
            f"{class_name} generates without a cache in transformers, and text-generation "
            "compiles decoders that keep the keys and values of each token.",
            hint=OTHER_DECODER,
        )
    further_inputs = [
        name for name, value in inputs.items() if isinstance(value, torch.Tensor) and name not in _TOKEN_INPUTS
    ]
    if further_inputs:
        raise CompileError(
            f"{class_name} generates from further inputs in transformers, {', '.join(further_inputs)}, and "
            "text-generation compiles decoders of text alone.",
            hint=OTHER_DECODER,
        )
    if chooses_logits and LOGITS_PLACES in parameters:
        inputs = {**inputs, LOGITS_PLACES: torch.arange(inputs["input_ids"].shape[1])}
    free = torch.export.Dim.DYNAMIC
    shapes: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            shapes[name] = dict.fromkeys(range(value.ndim), free)
        elif name == CACHE:
            # Keys and values have the shape (rows, heads, tokens, size); a sliding window also counts its tokens.
            tensors = get_leaf_tensors({name: value}).values()
            shapes[name] = [{0: free, 2: free} if tensor.ndim == 4 else {} for tensor in tensors]
    return DecodingStep(model, inputs, shapes)
