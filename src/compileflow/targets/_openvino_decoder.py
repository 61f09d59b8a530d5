"""Decoders on OpenVINO: one stateful graph that reads the next tokens of rows, with its cache as state.

One graph serves prompts and single tokens, so an artifact holds its weights once.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compileflow.contracts import Arrays
from compileflow.contracts.toolkit import refusal, require_open, violated_size
from compileflow.errors import CompileError, InputError, first_line
from compileflow.source_model import SourceModel
from compileflow.source_model.decoding import OTHER_DECODER, decoding_step, lost_cache, token_positions
from compileflow.source_model.free_batch import free_batch, free_repeats
from compileflow.spec import Precision

LOGITS = "logits"
# Inputs of the graph. The last one names the row of the cache that takes each place before the tokens are read.
INPUTS = ("input_ids", "attention_mask", "position_ids", "beam_idx")
# A further input of the loaded graph: the tokens whose logits are computed.
_PLACES = "logits_places"
# Operations between the product that gives the logits and the output.
_AFTER_PRODUCT = ("Add", "Convert", "Divide", "Multiply", "Result", "Tanh")


def export_decoder(source_model: SourceModel) -> Any:
    """Export one step of a decoder as a stateful graph.

    Raises:
        CompileflowError: The exporter refused the model, or its graph has no state.
    """
    import torch
    from transformers.exporters import OpenVINOConfig, OpenVINOExporter

    class_name = type(source_model.model).__name__
    try:
        step = decoding_step(source_model)
        config = OpenVINOConfig(dynamic=True, dynamic_shapes=dict(step.dynamic_shapes))
        with warnings.catch_warnings(), torch.no_grad(), free_batch(), free_repeats():
            # The exporter warns that it was tested with an older torch, and torch.export warns about itself.
            warnings.simplefilter("ignore")
            graph = OpenVINOExporter().export(step.model, dict(step.inputs), config).program
    except CompileError:
        raise
    except Exception as error:
        raise refusal(
            "The OpenVINO exporter",
            error,
            model=class_name,
            reason=violated_size(error) or first_line(error),
            hint=OTHER_DECODER,
        ) from error
    if not graph.get_sinks():
        raise lost_cache(class_name)
    names = {name for port in graph.inputs for name in port.get_names()}
    if not {"input_ids", "attention_mask", "beam_idx"} <= names <= set(INPUTS):
        raise CompileError(
            f"Expected the inputs {', '.join(INPUTS)} of the graph of {class_name}, "
            f"got {', '.join(sorted(names))}.",
            hint=OTHER_DECODER,
        )
    _repeat_heads(graph)
    return graph


def _repeat_heads(graph: Any) -> None:
    """Repeat keys and values for several heads in the form that OpenVINO's attention with a cache recognizes.

    Otherwise the runtime splits attention into products and a softmax, and copies the whole cache for each token.
    """
    from openvino import opset13 as opset

    for attention in graph.get_ordered_ops():
        if attention.get_type_name() != "ScaledDotProductAttention":
            continue
        heads = attention.input_value(0).get_partial_shape()[1]
        for port in attention.input_values()[1:3]:
            operations = _chain(port, ("Reshape", "Broadcast", "Unsqueeze"))
            shape: Any = operations[-1].get_output_partial_shape(0) if operations else ()
            if len(shape) != 5 or shape[2] != 1 or shape[1].is_dynamic or heads.is_dynamic:
                continue
            counts = np.array([1, 1, heads.get_length() // shape[1].get_length(), 1, 1])
            repeated = opset.broadcast(operations[-1], counts, broadcast_spec="BIDIRECTIONAL")
            operations[0].input(0).replace_source_output(repeated.output(0))
    graph.validate_nodes_and_infer_types()


def _chain(port: Any, kinds: Sequence[str]) -> list[Any]:
    """Return the operations of these kinds before a port, the last one first; [] if there are others."""
    operations: list[Any] = []
    for kind in kinds:
        operation = port.get_node()
        if operation.get_type_name() != kind:
            return []
        operations.append(operation)
        port = operation.input_value(0)
    return operations


def compress_weights(graph: Any, precision: Precision, *, group_size: int, symmetric: bool) -> Any:
    """Store the weights of a graph in 8 or 4 bits.

    At int4, embeddings and the last layer keep 8 bits. A layer whose size is not a multiple of the group gets a
    smaller group.

    Args:
        graph: A graph with weights in fp32.
        precision: int8 or int4.
        group_size: At int4, weights that share one scale; -1 for a whole channel.
        symmetric: At int4, use no zero points.
    """
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)
    settings: dict[str, Any] = {"mode": nncf.CompressWeightsMode.INT8_ASYM}
    if precision is Precision.INT4:
        modes = nncf.CompressWeightsMode
        settings = {
            "mode": modes.INT4_SYM if symmetric else modes.INT4_ASYM,
            "group_size": group_size,
            "ratio": 1.0,
            "advanced_parameters": nncf.AdvancedCompressionParameters(
                group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST
            ),
        }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return nncf.compress_weights(graph, **settings)
        except Exception as error:
            raise refusal("NNCF", error, reason=first_line(error)) from error


def choose_logits(graph: Any) -> None:
    """Let a graph compute the logits of some tokens alone, whose places are a further input.

    Of a prompt, only the last token's logits count, and the product that gives them is as large as several layers.
    Nothing changes in a graph whose logits are not a product of the hidden states, and at most a few operations.
    """
    import openvino
    from openvino import opset13 as opset

    node = graph.output(LOGITS).get_node()
    while node.get_type_name() in _AFTER_PRODUCT:
        sources = [port.get_node() for port in node.input_values()]
        sources = [source for source in sources if source.get_type_name() != "Constant"]
        if len(sources) != 1:
            return
        node = sources[0]
    if node.get_type_name() != "MatMul" or node.input_value(0).get_partial_shape().rank.get_length() != 3:
        return
    places = opset.parameter(openvino.PartialShape([-1]), np.int64, name=_PLACES)
    places.output(0).get_tensor().set_names({_PLACES})
    chosen = opset.gather(node.input_value(0), places, opset.constant(np.int64(1)))
    node.input(0).replace_source_output(chosen.output(0))
    graph.add_parameters([places])
    graph.validate_nodes_and_infer_types()


def whole_row_inputs(inputs: Mapping[str, NDArray[Any]]) -> Arrays:
    """Return the inputs of the graph that read rows from their beginning."""
    mask = inputs["attention_mask"]
    rows, places = np.arange(len(mask), dtype=np.int32), np.arange(mask.shape[1])
    return {**inputs, "position_ids": token_positions(mask), "beam_idx": rows, _PLACES: places}


class OpenVinoDecoder:
    """Runs a stateful graph; each continuation has a request of its own, which holds its cache."""

    def __init__(self, model: Any):
        self._model = model
        self._inputs = frozenset(name for port in model.inputs for name in port.get_names())
        self._idle_requests: list[Any] = []

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        mask = inputs["attention_mask"]
        continuation = self.start()
        try:
            return {LOGITS: continuation.read(inputs["input_ids"], mask, token_positions(mask))}
        finally:
            continuation.close()

    def start(self) -> OpenVinoContinuation:
        """Begin with an empty cache, in a request that no other continuation uses."""
        model = require_open(self._model)
        try:
            request = self._idle_requests.pop()
        except IndexError:
            request = model.create_infer_request()
        return OpenVinoContinuation(request, self._idle_requests, self._inputs)

    def close(self) -> None:
        self._model = None
        self._idle_requests = []


class OpenVinoContinuation:
    """Rows whose cache is the state of an inference request."""

    def __init__(self, request: Any, idle_requests: list[Any], names: frozenset[str]):
        # A request that was used before still holds the rows of its last continuation.
        request.reset_state()
        self.length = 0
        self._request = request
        self._idle_requests = idle_requests
        self._names = names
        self._rows: NDArray[np.int32] | None = None

    def read(
        self,
        input_ids: NDArray[Any],
        attention_mask: NDArray[Any],
        position_ids: NDArray[Any],
        *,
        last: bool = False,
    ) -> NDArray[Any]:
        """Read the next tokens of each row, after putting the rows into the order that was asked for."""
        import openvino

        rows, length = input_ids.shape
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "beam_idx": np.arange(rows, dtype=np.int32) if self._rows is None else self._rows,
            _PLACES: np.arange(length - 1 if last else 0, length),
        }
        request = require_open(self._request)
        # The request reads this memory until wait() returns, and does not keep it alive.
        arrays = {name: np.ascontiguousarray(inputs[name]) for name in self._names}
        for name, array in arrays.items():
            request.set_tensor(name, openvino.Tensor(array, shared_memory=True))
        # infer() would compute in this thread, and each token would take a millisecond longer.
        request.start_async()
        request.wait()
        answer = request.get_tensor(LOGITS).data
        self._rows = None
        self.length += length
        # A copy, because the request writes its next answer into the same memory.
        logits: NDArray[Any] = (answer[:, -1:] if last else answer).copy()
        expected_shape = (rows, 1 if last else length)
        if logits.shape[:2] != expected_shape:
            # Attention with a cache of other rows does not fail by itself.
            raise InputError(
                f"Expected logits for {expected_shape} rows and tokens, got {logits.shape[:2]}.",
                hint="Compile the model again.",
            )
        return logits

    def reorder(self, rows: NDArray[Any]) -> None:
        """Remember which row takes each place; the graph moves the cache when it reads the next tokens."""
        rows = np.asarray(rows, np.int32)
        self._rows = rows if self._rows is None else self._rows[rows]

    def close(self) -> None:
        """Give the request back."""
        request, self._request = self._request, None
        if request is not None:
            self._idle_requests.append(request)
