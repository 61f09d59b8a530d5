"""Weights of decoders in 4 or 8 bits on ONNX Runtime, one scale for each group of a column."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Products with weights. What a fusion makes of them is undone before.
_PRODUCTS = ("MatMul", "Gemm")
# Computes with activations in 8 bits. Level 0 keeps fp32 and took 13 times as long for a token.
_ACCURACY_LEVEL = 4


def compress_weights(model: Any, logits: str, *, bits: int, group_size: int, symmetric: bool) -> None:
    """Store the weights of a decoder's products in a few bits, its embeddings and its last layer in 8 bits.

    Args:
        model: A graph with weights in fp32, which is changed.
        logits: Name of the output that the last layer gives.
        bits: 4 or 8.
        group_size: Weights that share one scale: 16, 32, 64, 128 or 256.
        symmetric: Use no zero points.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    [output] = [value for value in model.graph.outputs if value.name == logits]
    last = output.producer()
    while last is not None and last.op_type not in _PRODUCTS:
        last = last.inputs[0].producer()
    for node, weights, bias in list(_products(model)):
        node_bits = 8 if node is last else bits
        arrays = _quantized(weights, node_bits, group_size=group_size, symmetric=symmetric)
        inputs = [node.inputs[0], *_constants(model, node.inputs[1].name, arrays)]
        if bias is not None:
            # The places of the zero points and of an order of the groups come first.
            inputs += [None] * (5 - len(inputs)) + [bias]
        rows, columns = weights.shape
        attributes = {"K": rows, "N": columns, "bits": node_bits, "accuracy_level": _ACCURACY_LEVEL}
        _replace(model, node, "MatMulNBits", inputs, attributes | {"block_size": group_size})
    for node, table in list(_tables(model)):
        arrays = _quantized(table.T, 8, group_size=group_size, symmetric=symmetric)
        arrays = [array.reshape(len(table), -1) for array in arrays]
        # The last group of a row may be longer than the row.
        arrays[0] = arrays[0][:, : table.shape[1]]
        data, *scales = _constants(model, node.inputs[0].name, arrays)
        attributes = {"bits": 8, "block_size": group_size, "gather_axis": 0, "quantize_axis": 1}
        _replace(model, node, "GatherBlockQuantized", [data, node.inputs[1], *scales], attributes)
    model.graph.opset_imports.setdefault("com.microsoft", 1)
    RemoveUnusedNodesPass()(model)


def _constants(model: Any, name: str, arrays: Sequence[NDArray[Any]]) -> list[Any]:
    """Add packed weights, their scales and their zero points to a graph."""
    import onnx_ir

    values = []
    for part, array in zip(("packed", "scales", "zero_points"), arrays, strict=False):
        tensor = onnx_ir.tensor(np.ascontiguousarray(array), name=f"{name}.{part}")
        value = onnx_ir.Value(
            name=tensor.name, const_value=tensor, shape=tensor.shape, type=onnx_ir.TensorType(tensor.dtype)
        )
        model.graph.register_initializer(value)
        values.append(value)
    return values


def _replace(model: Any, node: Any, op_type: str, inputs: Sequence[Any], attributes: Mapping[str, int]) -> None:
    """Replace a node with one of ONNX Runtime's own operators."""
    import onnx_ir

    new = onnx_ir.node(op_type, inputs, attributes=attributes, domain="com.microsoft")
    onnx_ir.convenience.replace_nodes_and_values(model.graph, node, [node], [new], node.outputs, new.outputs)


def _tables(model: Any) -> Iterator[tuple[Any, NDArray[Any]]]:
    """Yield each node that chooses rows of a table of weights, and the table."""
    for node in model.graph:
        if node.op_type != "Gather" or node.inputs[0].const_value is None:
            continue
        axis = node.attributes.get("axis")
        table = node.inputs[0].const_value.numpy()
        if table.ndim == 2 and table.dtype == np.float32 and not (axis and axis.as_int()):
            yield node, table


def _products(model: Any) -> Iterator[tuple[Any, NDArray[Any], Any]]:
    """Yield each product with a matrix of weights, these as (inputs, outputs), and its bias."""
    for node in model.graph:
        if node.op_type not in _PRODUCTS or node.inputs[1].const_value is None:
            continue
        weights = node.inputs[1].const_value.numpy()
        flags = {name: attribute.value for name, attribute in node.attributes.items()}
        if weights.ndim != 2 or flags.get("transA") or {flags.get("alpha", 1.0), flags.get("beta", 1.0)} != {1.0}:
            continue
        yield (
            node,
            weights.T if flags.get("transB") else weights,
            node.inputs[2] if len(node.inputs) > 2 else None,
        )


def _quantized(weights: NDArray[Any], bits: int, *, group_size: int, symmetric: bool) -> list[NDArray[Any]]:
    """Return weights, scales and zero points as ONNX Runtime's MatMulNBits reads them, output after output."""
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        DefaultWeightOnlyQuantizer,
    )

    config = DefaultWeightOnlyQuantConfig(block_size=group_size, is_symmetric=symmetric, bits=bits)
    # It reads the memory of an array row by row, whatever its strides say.
    packed, scales, zero_points = DefaultWeightOnlyQuantizer(config).qbits_block_quant(
        np.ascontiguousarray(weights, np.float32)
    )
    return [packed, scales] if symmetric else [packed, scales, zero_points]
