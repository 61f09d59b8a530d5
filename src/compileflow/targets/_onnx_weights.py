"""Weights in 4 bits on ONNX Runtime, in the operator and the form that its own quantizer makes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Products with weights. What a fusion makes of them is undone before.
_PRODUCTS = ("MatMul", "Gemm")
# Computes with activations in 8 bits. Level 0 keeps fp32 and took 13 times as long for a token.
_ACCURACY_LEVEL = 4


def compress_weights(model: Any, logits: str, *, group_size: int, symmetric: bool) -> None:
    """Store the weights of a decoder's products in 4 bits, and those of its last layer in 8 bits.

    Args:
        model: A graph with weights in fp32, which is changed.
        logits: Name of the output that the last layer gives.
        group_size: Weights that share one scale: 16, 32, 64, 128 or 256.
        symmetric: Use no zero points.
    """
    import onnx_ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    [output] = [value for value in model.graph.outputs if value.name == logits]
    last = output.producer()
    while last is not None and last.op_type not in _PRODUCTS:
        last = last.inputs[0].producer()
    for node, weights, bias in list(_products(model)):
        bits = 8 if node is last else 4
        packed, scales, zero_points = _quantized(weights, bits, group_size=group_size, symmetric=symmetric)
        arrays = {"packed": packed, "scales": scales} | ({} if symmetric else {"zero_points": zero_points})
        inputs = [node.inputs[0]]
        for part, array in arrays.items():
            tensor = onnx_ir.tensor(array, name=f"{node.inputs[1].name}.{part}")
            value = onnx_ir.Value(
                name=tensor.name,
                const_value=tensor,
                shape=tensor.shape,
                type=onnx_ir.TensorType(tensor.dtype),
            )
            model.graph.register_initializer(value)
            inputs.append(value)
        if bias is not None:
            # The places of the zero points and of an order of the groups come first.
            inputs += [None] * (5 - len(inputs)) + [bias]
        rows, columns = weights.shape
        product = onnx_ir.node(
            "MatMulNBits",
            inputs,
            attributes={
                "K": rows,
                "N": columns,
                "bits": bits,
                "block_size": group_size,
                "accuracy_level": _ACCURACY_LEVEL,
            },
            domain="com.microsoft",
        )
        onnx_ir.convenience.replace_nodes_and_values(
            model.graph, node, [node], [product], node.outputs, product.outputs
        )
    model.graph.opset_imports.setdefault("com.microsoft", 1)
    RemoveUnusedNodesPass()(model)


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


def _quantized(weights: NDArray[Any], bits: int, *, group_size: int, symmetric: bool) -> Any:
    """Return weights, scales and zero points as ONNX Runtime's MatMulNBits reads them."""
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        DefaultWeightOnlyQuantizer,
    )

    config = DefaultWeightOnlyQuantConfig(block_size=group_size, is_symmetric=symmetric, bits=bits)
    # It reads the memory of an array row by row, whatever its strides say.
    return DefaultWeightOnlyQuantizer(config).qbits_block_quant(np.ascontiguousarray(weights, np.float32))
