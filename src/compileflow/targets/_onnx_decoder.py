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
from compileflow.source_model.decoding import CACHE, LOGITS_PLACES, lost_cache, token_positions
from compileflow.targets._onnx_memory import Arena

LOGITS = "logits"
# The exporter marks a tensor that is an input and an output.
_INPUT, _OUTPUT = f"input.{CACHE}", f"output.{CACHE}"
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


def has_cache(session: Any) -> bool:
    """Return whether a session runs one step of a decoder."""
    return any(CACHE in value.name for value in session.get_inputs())


def whole_row_inputs(session: Any, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
    """Return the inputs of a session that read rows from their beginning."""
    mask = inputs["attention_mask"]
    places = np.arange(mask.shape[1])
    cache = _Cache(session).empty(len(mask))
    return {**inputs, "position_ids": token_positions(mask), LOGITS_PLACES: places, **cache}


def check_cache(model: Any, class_name: str) -> None:
    """Refuse a graph that reads a cache and does not return it with the next tokens.

    Args:
        model: The graph.
        class_name: Class of the model.

    Raises:
        CompileError: The graph has no cache, or does not return all of it.
    """
    inputs = {value.name for value in model.graph.inputs if value.name.startswith(_INPUT) and value.shape}
    missing = {name.replace(_INPUT, _OUTPUT) for name in inputs} - {value.name for value in model.graph.outputs}
    if missing or not inputs:
        raise lost_cache(class_name)


def transpose_batches(model: Any) -> None:
    """Undo a fusion that ONNX Runtime does not run: FusedMatMul moves a batch axis only beside an equal rank.

    The hidden states of the chosen tokens and the tied weights of a decoder's last layer differ in rank.
    """
    import onnx_ir

    for node in [node for node in model.graph if node.op_type == "FusedMatMul"]:
        ranks = [len(value.shape) if value.shape is not None else 0 for value in node.inputs]
        if ranks[0] == ranks[1] or not all(ranks):
            continue
        for position, name in enumerate(("transBatchA", "transBatchB")):
            flag, rank = node.attributes.pop(name, None), ranks[position]
            if flag is not None and flag.as_int():
                # The definition of the flag: the first axis goes to the second-to-last place.
                order = [*range(1, rank - 1), 0, rank - 1]
                transpose = onnx_ir.node("Transpose", [node.inputs[position]], attributes={"perm": order})
                model.graph.insert_before(node, transpose)
                node.replace_input_with(position, transpose.outputs[0])


def plain_last_layer(model: Any) -> None:
    """Give the last layer transposed weights of its own, if it shares those of the embeddings; quantizers need it.

    They know MatMul with constant weights. At fp32 the weights stay shared.
    """
    import onnx_ir

    for node in [node for node in model.graph if node.op_type == "FusedMatMul"]:
        weights = node.inputs[1].const_value
        flags = {name: attribute.value for name, attribute in node.attributes.items()}
        if (
            weights is None
            or len(weights.shape) != 2
            or flags.pop("alpha", 1.0) != 1.0
            or not flags.pop("transB", 0)
        ):
            continue
        if any(flags.values()):
            continue
        columns = onnx_ir.tensor(np.ascontiguousarray(weights.numpy().T), name=f"{node.inputs[1].name}.T")
        value = onnx_ir.Value(name=columns.name, const_value=columns, shape=columns.shape)
        value.dtype = columns.dtype
        model.graph.register_initializer(value)
        product = onnx_ir.node("MatMul", [node.inputs[0], value], outputs=None)
        onnx_ir.convenience.replace_nodes_and_values(
            model.graph, node, [node], [product], node.outputs, product.outputs
        )


class OnnxDecoder:
    """Runs a session whose cache goes in and comes out; each continuation holds a cache of its own."""

    def __init__(self, session: Any):
        self._session = session
        self._cache = _Cache(session)
        self._arena = Arena()

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        mask = inputs["attention_mask"]
        return {LOGITS: self.start().read(inputs["input_ids"], mask, token_positions(mask))}

    def start(self) -> OnnxContinuation:
        """Begin with an empty cache."""
        return OnnxContinuation(require_open(self._session), self._cache, self._arena)

    def close(self) -> None:
        self._session = None


class OnnxContinuation:
    """Rows whose keys and values are bound to the session call after call."""

    def __init__(self, session: Any, cache: _Cache, arena: Arena):
        self.length = 0
        self._session = session
        self._cache = cache
        self._arena = arena
        self._values: dict[str, Any] = {}

    def read(
        self,
        input_ids: NDArray[Any],
        attention_mask: NDArray[Any],
        position_ids: NDArray[Any],
        *,
        last: bool = False,
    ) -> NDArray[Any]:
        """Read the next tokens of each row."""
        session, cache = require_open(self._session), self._cache
        length = input_ids.shape[1]
        if not self._values:
            self._values = _bound(cache.empty(len(input_ids)))
        tokens = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            LOGITS_PLACES: np.arange(length - 1 if last else 0, length),
        }
        binding = session.io_binding()
        inputs = self._values | _bound({name: array for name, array in tokens.items() if name in cache.inputs})
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name in cache.outputs:
            binding.bind_output(name, "cpu")
        session.run_with_iobinding(binding, self._arena.run_options({"attention_mask": attention_mask}))
        answers = dict(zip(cache.outputs, binding.get_outputs(), strict=True))
        self._values |= {name: answers[output] for name, output in cache.successors.items()}
        self.length += length
        logits: NDArray[Any] = answers[LOGITS].numpy()
        return logits[:, -1:] if last else logits

    def reorder(self, rows: NDArray[Any]) -> None:
        """Copy the rows of the cache into their new places."""
        self._values |= _bound({name: self._values[name].numpy()[rows] for name in self._cache.successors})

    def close(self) -> None:
        """Forget the cache."""
        self._session, self._values = None, {}


class _Cache:
    """The ports of a session through which its cache goes.

    Attributes:
        inputs: Names of all inputs.
        outputs: Names of all outputs.
        successors: Name of each input with keys or values, and of the output that is its input of the next call.
    """

    def __init__(self, session: Any):
        ports = session.get_inputs()
        self.inputs = [port.name for port in ports]
        self.outputs = [port.name for port in session.get_outputs()]
        self._ports = {port.name: port for port in ports if CACHE in port.name}
        # A layer with a sliding window also has a number of no shape, which the exported graph does not use.
        self.successors = {
            name: name.replace(_INPUT, _OUTPUT) for name, port in self._ports.items() if len(port.shape) > 1
        }

    def empty(self, rows: int) -> Arrays:
        """Return keys and values of no tokens, of shape (rows, heads, 0, size)."""
        return {
            name: np.zeros((rows, port.shape[1], 0, port.shape[3]) if port.shape else (), _TYPES[port.type])
            for name, port in self._ports.items()
        }


def _bound(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """Return arrays as values that can be bound to a session."""
    import onnxruntime

    return {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(np.asarray(array, order="C"))
        for name, array in arrays.items()
    }
