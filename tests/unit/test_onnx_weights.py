"""Weights in few bits: ONNX Runtime answers with them as NumPy does with the weights in fp32, up to the grid."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from compileflow.targets._onnx_weights import compress_weights

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

# Rows of the table, its width, the inner width, and the size of a group, which does not divide each width.
SHAPES = [(100, 64, 48, 32), (50, 40, 33, 32), (9, 20, 8, 16), (128, 576, 64, 128)]


def decoder_of(weights: dict[str, NDArray[Any]]) -> Any:
    """A table of embeddings, one layer with a bias, and the last layer."""
    import onnx
    import onnx_ir
    from onnx import helper, numpy_helper

    rows, width = weights["table"].shape
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["hidden"]),
        helper.make_node("Gemm", ["hidden", "layer", "bias"], ["inner"]),
        helper.make_node("MatMul", ["inner", "last"], ["logits"]),
    ]
    outputs = [
        helper.make_tensor_value_info("hidden", onnx.TensorProto.FLOAT, ["tokens", width]),
        helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["tokens", rows]),
    ]
    graph = helper.make_graph(
        nodes,
        "decoder",
        [helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["tokens"])],
        outputs,
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return onnx_ir.from_proto(model)


def weights_of(rows: int, width: int, inner: int) -> dict[str, NDArray[Any]]:
    generator = np.random.default_rng(0)
    shapes = {"table": (rows, width), "layer": (width, inner), "bias": (inner,), "last": (inner, rows)}
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def answers(model: Any, ids: NDArray[Any]) -> list[NDArray[Any]]:
    import onnx_ir
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    content = onnx_ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, settings, providers=["CPUExecutionProvider"])
    return list(session.run(["hidden", "logits"], {"ids": ids}))


@pytest.mark.parametrize(
    ("bits", "symmetric", "farthest"), [(8, False, 0.02), (8, True, 0.02), (4, False, 0.2), (4, True, 0.2)]
)
@pytest.mark.parametrize(("rows", "width", "inner", "group_size"), SHAPES)
def test_answers_are_those_of_the_weights(
    rows: int, width: int, inner: int, group_size: int, bits: int, symmetric: bool, farthest: float
) -> None:
    weights = weights_of(rows, width, inner)
    model = decoder_of(weights)
    compress_weights(model, "logits", bits=bits, group_size=group_size, symmetric=symmetric)
    ids = np.arange(rows)
    hidden, logits = answers(model, ids)
    # A step of the widest group of 8 bits: a zero point is rounded as well as a weight.
    table = weights["table"]
    step = 2 * np.abs(table).max() / 255
    assert np.abs(hidden - table).max() <= step
    expected = (table @ weights["layer"] + weights["bias"]) @ weights["last"]
    assert np.linalg.norm(logits - expected) <= farthest * np.linalg.norm(expected)


def test_ties_and_rows_of_zeros_stay_exact() -> None:
    weights = weights_of(50, 40, 33)
    weights["table"][7] = 0
    weights["table"][9] = weights["table"][8]
    model = decoder_of(weights)
    compress_weights(model, "logits", bits=8, group_size=32, symmetric=False)
    hidden, _ = answers(model, np.arange(50))
    assert not hidden[7].any()
    assert (hidden[9] == hidden[8]).all()
