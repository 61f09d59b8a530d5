"""ONNX Runtime's optimizations keep the meaning of a graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from compileflow.catalog import get_target
from compileflow.contracts import ComponentRecord, TensorRecord
from compileflow.spec import Precision


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
