"""Exported graphs do for other sizes what the model does: they keep the batch axis, and repeat as often."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from compileflow.source_model.free_batch import free_batch, free_repeats


class Squeezing(torch.nn.Module):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return ids[:, :1].squeeze() + ids[:, 1:2, None].squeeze()


def test_squeeze_keeps_the_batch_axis_of_one_row() -> None:
    batch = torch.export.Dim("batch", min=1, max=8)
    with free_batch():
        program = torch.export.export(Squeezing(), (torch.ones(3, 4),), dynamic_shapes=({0: batch},), strict=False)
    assert program.module()(torch.ones(1, 4)).shape == (1,)
    assert program.module()(torch.ones(5, 4)).shape == (5,)


class Repeating(torch.nn.Module):
    """CANINE's way back from every fourth element to all of them."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        length = values.shape[1]
        repeated = torch.repeat_interleave(values[:, 3:-4:4], repeats=4, dim=-1)
        rest = torch.repeat_interleave(values[:, -1:], repeats=length % 4 + 4, dim=-1)
        return torch.cat([repeated, rest], dim=-1)


@pytest.mark.filterwarnings("ignore")
def test_traced_graph_repeats_as_often_as_the_length_says(tmp_path: Path) -> None:
    path = str(tmp_path / "model.onnx")
    with free_repeats():
        torch.onnx.export(
            Repeating(),
            (torch.rand(3, 16),),
            path,
            input_names=["values"],
            dynamic_axes={"values": {0: "batch", 1: "sequence"}},
            dynamo=False,
        )
    session = onnxruntime.InferenceSession(path)

    (repeated,) = session.run(None, {"values": np.arange(10, dtype=np.float32)[None]})

    assert repeated.tolist() == [[3, 3, 3, 3, 9, 9, 9, 9, 9, 9]]
