"""Exported graphs do for other sizes and for zeros what the model does."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
from transformers.models.deberta_v2 import modeling_deberta_v2
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder
from transformers.models.t5.modeling_t5 import T5Attention

from compileflow.source_model.free_batch import free_batch, free_repeats
from compileflow.source_model.position_buckets import tabulated_buckets
from compileflow.source_model.traceable import traceable
from compileflow.targets._openvino_graph import divide_as_torch, keep_rounded_quotients, resize_as_torch
from compileflow.targets.onnx_runtime import exact_zeros


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


class Repeated(torch.nn.Module):
    """YOSO's mask for each head."""

    def forward(self, mask: torch.Tensor) -> torch.Tensor:
        return mask.unsqueeze(1).repeat_interleave(4, dim=1)


def test_repeated_axis_is_exported_as_an_expansion() -> None:
    mask = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    with free_repeats():
        program = torch.export.export(Repeated(), (mask,), strict=False)
    assert not [node for node in program.graph.nodes if "repeat" in str(node.target)]
    assert torch.equal(program.module()(mask), Repeated()(mask))


class Normalizing(torch.nn.Module):
    """Divides each row by its norm. 1e-8 keeps a row of zeros finite."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + 1e-8)


@pytest.mark.filterwarnings("ignore")
def test_small_number_that_keeps_zeros_finite_stays_in_the_graph(tmp_path: Path) -> None:
    path = str(tmp_path / "model.onnx")
    with exact_zeros():
        torch.onnx.export(
            Normalizing(), (torch.rand(2, 8),), path, input_names=["rows"], dynamo=True, verbose=False
        )
    session = onnxruntime.InferenceSession(path)

    (normalized,) = session.run(None, {"rows": np.zeros((2, 8), np.float32)})

    assert np.array_equal(normalized, np.zeros((2, 8)))


class Resizing(torch.nn.Module):
    """Resizes a table of positions to the patches of an image."""

    def forward(self, table: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        size = (image.shape[2] // 16, image.shape[3] // 16)
        return torch.nn.functional.interpolate(table, size=size, mode="bicubic", align_corners=False)


@pytest.mark.filterwarnings("ignore")
def test_table_of_positions_is_resized_to_one_patch_as_torch_does() -> None:
    table, image = torch.rand(1, 2, 4, 4), torch.rand(2, 3, 64, 96)
    free = torch.export.Dim.DYNAMIC
    program = torch.export.export(Resizing(), (table, image), dynamic_shapes=({}, {2: free, 3: free}))
    model = openvino.convert_model(program)
    resize_as_torch(model)
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    narrow = torch.rand(2, 3, 64, 16)
    resized = compiled([table.numpy(), narrow.numpy()])[0]

    np.testing.assert_allclose(resized, Resizing()(table, narrow).numpy(), atol=1e-5)


class Dividing(torch.nn.Module):
    """Divides the lengths of recordings and the size of their batch."""

    def forward(self, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        lengths, (rows, samples) = mask.sum(-1) - 10, mask.shape
        size = torch.ones(samples // 41, -(-rows // 41))
        return (
            torch.div(lengths, 5, rounding_mode="floor"),
            torch.div(lengths, 5, rounding_mode="trunc"),
            lengths // -torch.ones_like(lengths).cumsum(0),
            size + samples // 5,
        )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("exporter", "precision"), [("graph", "bf16"), ("trace", "f32")])
def test_quotients_of_lengths_and_sizes_are_exact(exporter: str, precision: str) -> None:
    example = torch.ones(90, 100, dtype=torch.int64)
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    if exporter == "graph":
        model = openvino.convert_model(torch.export.export(Dividing(), (example,), dynamic_shapes=(free,)))
    else:
        model = openvino.convert_model(torch.jit.trace(Dividing(), (example,)), example_input=(example,))
    divide_as_torch(model)
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision})
    rows, samples = 82, 41 * 41
    mask = (torch.arange(samples) < torch.arange(rows)[:, None]).long()

    answers = compiled([mask.numpy()])

    lengths = range(-10, rows - 10)
    assert answers[0].tolist() == [length // 5 for length in lengths]
    assert answers[1].tolist() == [int(length / 5) for length in lengths]
    assert answers[2].tolist() == [length // -number for number, length in enumerate(lengths, start=1)]
    assert answers[3].shape == (41, 2)


class Bucketing(torch.nn.Module):
    """DeBERTa's buckets of the distances of 64 tokens: the farthest is in the last bucket."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(ids.shape[1])
        distances = torch.clamp(torch.abs(positions[:, None] - positions[None, :]), min=16)
        shares = torch.log(distances / 16) / torch.log(torch.tensor(63 / 16))
        buckets: torch.Tensor = torch.ceil(shares * 15) + 16
        return buckets


@pytest.mark.filterwarnings("ignore")
def test_rounded_quotient_of_equal_numbers_is_one(tmp_path: Path) -> None:
    ids = torch.ones(1, 64, dtype=torch.int64)
    program = torch.export.export(Bucketing(), (ids,), dynamic_shapes=({1: torch.export.Dim.DYNAMIC},))
    openvino.save_model(openvino.convert_model(program), str(tmp_path / "model.xml"), compress_to_fp16=False)
    core = openvino.Core()
    model = core.read_model(str(tmp_path / "model.xml"))
    keep_rounded_quotients(model)

    (buckets,) = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([ids.numpy()]).values()

    assert buckets.max() == 16 + 15
    np.testing.assert_array_equal(buckets, Bucketing()(ids).numpy())


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(values)
        return values * 2


class Tripling(torch.autograd.Function):
    """Takes its context in a function of its own."""

    @staticmethod
    def forward(values: torch.Tensor) -> torch.Tensor:
        return values * 3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)


class OwnFunctions(torch.nn.Module):
    """BLOOM's activations and the mask of DeepSeek V3.2."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        hidden = torch.ones_like(values, dtype=torch.bool).scatter(-1, values.argmax(-1, keepdim=True), False)
        return Doubling.apply(values) + Tripling.apply(values) * hidden


@pytest.mark.filterwarnings("ignore")
def test_traced_graph_with_functions_of_its_own_can_be_saved(tmp_path: Path) -> None:
    values = torch.tensor([[1.0, 5.0, 2.0]])
    with traceable(), torch.no_grad():
        graph = torch.jit.trace(OwnFunctions(), (values,))
    torch.jit.save(graph, tmp_path / "model.pt")

    loaded = torch.jit.load(tmp_path / "model.pt")

    assert loaded(values).tolist() == [[5, 10, 10]]
    assert Doubling.apply(values).tolist() == [[2, 10, 4]]


@pytest.mark.parametrize(
    ("layer", "holder", "name", "settings"),
    [
        (T5Attention, T5Attention, "_relative_position_bucket", {"bidirectional": True, "max_distance": 100}),
        (T5Attention, T5Attention, "_relative_position_bucket", {"bidirectional": False, "num_buckets": 8}),
        (MPNetEncoder, MPNetEncoder, "relative_position_bucket", {"num_buckets": 32}),
        (
            modeling_deberta_v2.DebertaV2Layer,
            modeling_deberta_v2,
            "make_log_bucket_position",
            {"bucket_size": 32, "max_position": 512},
        ),
    ],
)
def test_buckets_of_positions_come_from_a_table(
    monkeypatch: pytest.MonkeyPatch, layer: type, holder: Any, name: str, settings: dict[str, Any]
) -> None:
    positions = torch.arange(512)[None] - torch.arange(512)[:, None]
    expected = getattr(holder, name)(positions, **settings)
    sizes = []
    logarithm = torch.log
    monkeypatch.setattr(torch, "log", lambda values: sizes.append(values.numel()) or logarithm(values))
    model = SimpleNamespace(modules=lambda: [layer.__new__(layer)])
    with tabulated_buckets(model, 512):
        actual = getattr(holder, name)(positions, **settings)
    assert (actual == expected).all()
    assert sizes
    assert max(sizes) <= 1025
    assert getattr(holder, name)(positions, **settings).equal(expected)
    assert max(sizes) == 512 * 512
