"""Bytes of a decoder's weights that one token reads, counted in the files of a compiled model.

All weights count, with their scales and zero points, except a table from which rows are only looked up: a token
reads one row of it. A tied table is also the last layer, so it counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Operations that turn stored weights into numbers, and those that look rows up.
_UNPACKING = (
    "Cast",
    "Constant",
    "Convert",
    "DequantizeLinear",
    "Identity",
    "Mul",
    "Multiply",
    "Reshape",
    "Sub",
    "Subtract",
    "Transpose",
)
_LOOKING_UP = ("Gather", "GatherBlockQuantized")


@dataclass(frozen=True)
class Operation:
    """One operation of a graph.

    Attributes:
        kind: Type of the operation.
        inputs: Names of the tensors that it reads.
        outputs: Names of the tensors that it makes.
    """

    kind: str
    inputs: Sequence[str]
    outputs: Sequence[str]


def bytes_per_token(constants: Mapping[str, float], operations: Iterable[Operation]) -> int:
    """Return the bytes of the constants that are not only looked up.

    Args:
        constants: Bytes of each constant by its name.
        operations: The operations in an order in which each comes after those whose tensors it reads.
    """
    # The constants that each tensor is unpacked from.
    origins = {name: {name} for name in constants}
    computed_with: set[str] = set()
    for operation in operations:
        sources = set().union(*(origins.get(name, set()) for name in operation.inputs))
        if operation.kind in _UNPACKING and all(name in origins for name in operation.inputs):
            origins |= dict.fromkeys(operation.outputs, sources)
        elif operation.kind not in _LOOKING_UP:
            computed_with |= sources
    return round(sum(size for name, size in constants.items() if name in computed_with))


def openvino_bytes(path: Path, *, bits: int = 32) -> int:
    """Return the bytes that a token reads of an IR.

    Args:
        path: The XML file.
        bits: Most bits of a number when the graph is loaded. OpenVINO stores fp32 for a model that runs in bf16.
    """
    import openvino

    constants, operations = {}, []
    for node in openvino.Core().read_model(path).get_ordered_ops():
        name, kind = node.get_friendly_name(), node.get_type_name()
        outputs = [f"{name}:{port.get_index()}" for port in node.outputs()]
        if kind == "Constant":
            number_bits = node.get_element_type().bitwidth
            constants[outputs[0]] = math.prod(node.get_output_shape(0)) * min(number_bits, bits) / 8
            continue
        sources = [port.get_source_output() for port in node.inputs()]
        inputs = [f"{source.get_node().get_friendly_name()}:{source.get_index()}" for source in sources]
        operations.append(Operation(kind, inputs, outputs))
    return bytes_per_token(constants, operations)


def onnx_bytes(path: Path) -> int:
    """Return the bytes that a token reads of an ONNX model."""
    import onnx
    from onnx import TensorProto
    from onnx.helper import tensor_dtype_to_np_dtype

    graph = onnx.load(str(path), load_external_data=False).graph
    four_bits = (TensorProto.INT4, TensorProto.UINT4)
    constants = {
        tensor.name: math.prod(tensor.dims)
        * (0.5 if tensor.data_type in four_bits else tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
        for tensor in graph.initializer
    }
    operations = [
        Operation(node.op_type, [name for name in node.input if name], node.output) for node in graph.node
    ]
    return bytes_per_token(constants, operations)


def torch_bytes(folder: Path) -> int:
    """Return the bytes that a token reads of a transformers model in fp32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        numbers -= model.get_input_embeddings().weight.numel()
    return int(numbers * 4)
