"""Decoders on AOTInductor: one program that reads the next tokens of rows, whose cache goes in and comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from compileflow.contracts import Arrays
from compileflow.contracts.toolkit import require_open, torch_threads
from compileflow.source_model import SourceModel
from compileflow.source_model.decoding import CACHE, LOGITS_PLACES, decoding_step, token_positions
from compileflow.source_model.interface import autocast_to
from compileflow.spec import Precision

if TYPE_CHECKING:
    import torch

# Runs a compiled package: tensors in, tensors out.
Package = Callable[[list["torch.Tensor"]], Sequence["torch.Tensor"]]

LOGITS = "logits"
# The load option with the names of the inputs before the cache, and the one with the shapes of the cache.
INPUTS_OPTION, CACHE_OPTION = "decoder_inputs", "decoder_cache"


@dataclass(frozen=True)
class DecoderModule:
    """One step of a decoder as a module that takes and returns tensors alone.

    Attributes:
        module: It takes the tokens and the cache by position, and returns the logits and the new cache.
        inputs: Example inputs.
        dynamic_shapes: Free axes of the inputs, as torch.export takes them.
        load_options: What `AotDecoder` needs to know.
    """

    module: torch.nn.Module
    inputs: tuple[torch.Tensor, ...]
    dynamic_shapes: tuple[Mapping[int, Any], ...]
    load_options: Mapping[str, JsonValue]


def decoder_module(source_model: SourceModel, precision: Precision) -> DecoderModule:
    """Return one step of a decoder for torch.export.

    Raises:
        RuntimeError: transformers cannot generate with the model.
    """
    import torch
    from transformers import DynamicCache

    step = decoding_step(source_model, chooses_logits=True)
    names = [name for name, value in step.inputs.items() if isinstance(value, torch.Tensor)]
    settings = {name: value for name, value in step.inputs.items() if name not in (*names, CACHE)}
    layers = step.inputs[CACHE].layers
    cache = [tensor for layer in layers for tensor in (layer.keys, layer.values)]

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = step.model

        def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            states = tensors[len(names) :]
            # Without the configuration: each layer keeps all tokens, and the mask hides those outside a window.
            past = DynamicCache(list(zip(states[::2], states[1::2], strict=True)))
            with autocast_to(precision):
                answer = self.model(
                    **dict(zip(names, tensors, strict=False)), **settings | {CACHE: past, "use_cache": True}
                )
            return answer[LOGITS].float(), *(part for layer in past.layers for part in (layer.keys, layer.values))

    free = torch.export.Dim.DYNAMIC
    shapes = (*(step.dynamic_shapes[name] for name in names), *({0: free, 2: free} for _ in cache))
    inputs = (*(step.inputs[name] for name in names), *cache)
    sizes = [[tensor.shape[1], tensor.shape[3]] for tensor in cache]
    return DecoderModule(Step().eval(), inputs, shapes, {INPUTS_OPTION: [*names], CACHE_OPTION: [*sizes]})


class AotDecoder:
    """Runs a package whose cache goes in and comes out; each continuation holds a cache of its own."""

    def __init__(self, package: Package, load_options: Mapping[str, Any], threads: int | None):
        self._package: Package | None = package
        self._names: Sequence[str] = load_options[INPUTS_OPTION]
        self._shapes: Sequence[Sequence[int]] = load_options[CACHE_OPTION]
        self._threads = threads

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        mask = inputs["attention_mask"]
        return {LOGITS: self.start().read(inputs["input_ids"], mask, token_positions(mask))}

    def start(self) -> AotContinuation:
        """Begin with an empty cache."""
        return AotContinuation(require_open(self._package), self._names, self._shapes, self._threads)

    def close(self) -> None:
        self._package = None


class AotContinuation:
    """Rows whose keys and values are tensors, given to the package call after call."""

    def __init__(
        self, package: Package, names: Sequence[str], shapes: Sequence[Sequence[int]], threads: int | None
    ):
        self.length = 0
        self._package: Package | None = package
        self._names = names
        self._shapes = shapes
        self._threads = threads
        self._cache: list[Any] = []

    def read(
        self,
        input_ids: NDArray[Any],
        attention_mask: NDArray[Any],
        position_ids: NDArray[Any],
        *,
        last: bool = False,
    ) -> NDArray[Any]:
        """Read the next tokens of each row."""
        import torch

        package = require_open(self._package)
        rows, length = input_ids.shape
        if not self._cache:
            self._cache = [torch.zeros(rows, heads, 0, size) for heads, size in self._shapes]
        arrays = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            LOGITS_PLACES: np.arange(length - 1 if last else 0, length),
        }
        tokens = [torch.as_tensor(np.ascontiguousarray(arrays[name])) for name in self._names]
        with torch.inference_mode(), torch_threads(self._threads):
            answer, *self._cache = package([*tokens, *self._cache])
        self.length += length
        logits: NDArray[Any] = answer.numpy()
        return logits[:, -1:] if last else logits

    def reorder(self, rows: NDArray[Any]) -> None:
        """Copy the rows of the cache into their new places."""
        import torch

        places = torch.as_tensor(rows)
        self._cache = [tensor.index_select(0, places) for tensor in self._cache]

    def close(self) -> None:
        """Forget the cache."""
        self._package, self._cache = None, []
