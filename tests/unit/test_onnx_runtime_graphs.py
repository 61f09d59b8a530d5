"""ONNX Runtime keeps the meaning of a graph, and gives the memory of a large call back."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from compileflow._process.child_process import peak_bytes, reset_peak
from compileflow._process.state import resident_bytes
from compileflow.catalog import get_target
from compileflow.contracts import ComponentRecord, TensorRecord
from compileflow.spec import Precision

_MIB = 2**20


def test_zeros_around_a_picture_are_pooled_with_it(tmp_path: Path) -> None:
    shape = ["batch", 1, 4, 4]
    graph = helper.make_graph(
        [
            helper.make_node("Pad", ["pixel_values", "widths"], ["padded"]),
            helper.make_node("MaxPool", ["padded"], ["logits"], kernel_shape=[3, 3]),
        ],
        "pooling",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)],
        [helper.make_tensor("widths", TensorProto.INT64, [8], [0, 0, 1, 1, 0, 0, 1, 1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, str(tmp_path / "model.onnx"))
    record = ComponentRecord(
        folder="components/default",
        inputs=(TensorRecord(name="pixel_values", dtype="float32", axes=("batch", 1, 4, 4)),),
        outputs=(TensorRecord(name="logits", dtype="float32", axes=("batch", 1, 4, 4)),),
        output_class="transformers.modeling_outputs:ImageClassifierOutput",
        max_sequence_length=1,
        dynamic_axes=True,
        pad_token_id=0,
        precision=Precision.FP32,
    )
    runner = get_target("onnx-runtime").load(tmp_path, record, device="cpu", threads=1)
    pooled = runner.run({"pixel_values": np.full((1, 1, 4, 4), -1, np.float32)})["logits"][0, 0]
    runner.close()
    assert pooled.tolist() == [[0, 0, 0, 0], [0, -1, -1, 0], [0, -1, -1, 0], [0, 0, 0, 0]]


def test_memory_of_a_large_call_is_given_back_after_two_small_ones(tmp_path: Path) -> None:
    # In a process of its own, because memory that earlier tests freed would serve the call unseen.
    with ProcessPoolExecutor(1, get_context("spawn")) as executor:
        memory = executor.submit(_memory_of_a_large_call, tmp_path).result(timeout=120)
    # 64 MiB for the embedded tokens.
    assert memory["peak"] > 60 * _MIB
    # While large calls go on, they keep their memory, because getting it again takes time.
    assert memory["kept"] > 60 * _MIB
    assert memory["after two small calls"] < 20 * _MIB


def _memory_of_a_large_call(folder: Path) -> dict[str, int]:
    """Make a large call between small ones.

    Returns:
        The peak of the large call and the resident memory after each step, in bytes above those before it.
    """
    width = 256
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["weights", "input_ids"], ["embedded"]),
            helper.make_node("Softmax", ["embedded"], ["shares"]),
            helper.make_node("ReduceSum", ["shares", "axes"], ["logits"], keepdims=0),
        ],
        "sums",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence"])],
        [
            helper.make_tensor("weights", TensorProto.FLOAT, [2, width], [1.0] * 2 * width),
            helper.make_tensor("axes", TensorProto.INT64, [1], [2]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, str(folder / "model.onnx"))
    record = ComponentRecord(
        folder="components/default",
        inputs=(TensorRecord(name="input_ids", dtype="int64", axes=("batch", "sequence")),),
        outputs=(TensorRecord(name="logits", dtype="float32", axes=("batch", "sequence")),),
        output_class="transformers.modeling_outputs:SequenceClassifierOutput",
        max_sequence_length=4096,
        dynamic_axes=True,
        pad_token_id=0,
        precision=Precision.FP32,
    )
    runner = get_target("onnx-runtime").load(folder, record, device="cpu", threads=1)
    runner.run({"input_ids": np.ones((1, 16), np.int64)})
    before = resident_bytes()
    assert reset_peak()
    answer = runner.run({"input_ids": np.ones((16, 4096), np.int64)})["logits"]
    assert np.allclose(answer, 1, atol=1e-4)
    del answer
    memory = {"peak": peak_bytes("self") - before, "kept": resident_bytes() - before}
    for _ in range(2):
        runner.run({"input_ids": np.ones((1, 16), np.int64)})
    memory["after two small calls"] = resident_bytes() - before
    runner.close()
    return memory
