"""Decoders on ONNX Runtime: one graph that reads the next tokens of rows, with its cache as inputs and outputs.

The outputs of a call are bound as the inputs of the next one, so the cache is never copied to NumPy and back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compileflow.contracts import Arrays
from compileflow.contracts.toolkit import require_open
from compileflow.source_model.decoding import CACHE, token_positions

LOGITS = "logits"
# The exporter marks a tensor that is an input and an output.
_INPUT, _OUTPUT = f"input.{CACHE}", f"output.{CACHE}"


def has_cache(session: Any) -> bool:
    """Return whether a session runs one step of a decoder."""
    return any(CACHE in value.name for value in session.get_inputs())


def whole_row_inputs(session: Any, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
    """Return the inputs of a session that read rows from their beginning."""
    mask = inputs["attention_mask"]
    caches = {value.name: _no_tokens(value, len(mask)) for value in session.get_inputs() if CACHE in value.name}
    return {**inputs, "position_ids": token_positions(mask), **caches}


class OnnxDecoder:
    """Runs a session whose cache goes in and comes out; each continuation holds a cache of its own."""

    def __init__(self, session: Any):
        self._session = session

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        mask = inputs["attention_mask"]
        return {LOGITS: self.start().read(inputs["input_ids"], mask, token_positions(mask))}

    def start(self) -> OnnxContinuation:
        """Begin with an empty cache."""
        return OnnxContinuation(require_open(self._session))

    def close(self) -> None:
        self._session = None


class OnnxContinuation:
    """Rows whose cache is bound to the session call after call."""

    def __init__(self, session: Any):
        self.length = 0
        self._session = session
        self._empty = {value.name: value for value in session.get_inputs() if CACHE in value.name}
        self._names = {value.name for value in session.get_inputs()}
        self._cache: dict[str, Any] = {}

    def read(
        self, input_ids: NDArray[Any], attention_mask: NDArray[Any], position_ids: NDArray[Any]
    ) -> NDArray[Any]:
        """Read the next tokens of each row."""
        import onnxruntime

        session = require_open(self._session)
        if not self._cache:
            self._cache = {
                name: onnxruntime.OrtValue.ortvalue_from_numpy(_no_tokens(value, len(input_ids)))
                for name, value in self._empty.items()
            }
        binding = session.io_binding()
        tokens = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        for name, array in tokens.items():
            if name in self._names:
                binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
        for name, value in self._cache.items():
            binding.bind_ortvalue_input(name, value)
        names = [value.name for value in session.get_outputs()]
        for name in names:
            binding.bind_output(name, "cpu")
        session.run_with_iobinding(binding)
        outputs = dict(zip(names, binding.get_outputs(), strict=True))
        self._cache = {name: outputs[name.replace(_INPUT, _OUTPUT)] for name in self._cache}
        self.length += input_ids.shape[1]
        logits: NDArray[Any] = outputs[LOGITS].numpy()
        return logits

    def reorder(self, rows: NDArray[Any]) -> None:
        """Copy the rows of the cache into their new places."""
        import onnxruntime

        self._cache = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value.numpy()[rows]))
            for name, value in self._cache.items()
        }

    def close(self) -> None:
        """Forget the cache."""
        self._session, self._cache = None, {}


def _no_tokens(value: Any, rows: int) -> NDArray[Any]:
    """Return keys or values of no tokens, of shape (rows, heads, 0, size)."""
    _, heads, _, size = value.shape
    return np.zeros((rows, heads, 0, size), np.float32)
