"""First divergence: a fault in one module is traced to that module, and a fault that cannot be traced says why."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compileflow.artifact.open import open_artifact
from compileflow.catalog import get_target
from compileflow.serving.component import LoadedComponent
from compileflow.source_model.load import load_source_model
from compileflow.spec import ComponentSpec, HfTask, Precision, ShapeBucket
from compileflow.targets.onnx_runtime import OnnxRuntimeTarget
from compileflow.targets.open_vino import OpenVinoTarget
from compileflow.testing.shared import make_once, shared_folder
from compileflow.validation.cases import Case
from compileflow.validation.divergence import Divergence, _Tree, first_divergence
from compileflow.validation.measure.module_outputs import Matcher, Positions, trace_modules
from tests.conftest import ModelFactory
from tests.in_process import InProcess
from tests.unit.proving import reseal

# This file edits traced graphs with torch.jit.
pytestmark = pytest.mark.filterwarnings(r"ignore:.*torch\.jit\..*deprecated:DeprecationWarning")

TASK = HfTask.TEXT_CLASSIFICATION
LAYER = "bert.encoder.layer.3"
FAULTY_MODULES = (
    f"{LAYER}.attention.self.key",
    f"{LAYER}.attention.output.LayerNorm",
    f"{LAYER}.intermediate.dense",
    "bert.embeddings.word_embeddings",
    "bert.pooler.dense",
)


@pytest.fixture(scope="module")
def bert(tiny_model: ModelFactory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of four layers."""

    def build(folder: Path) -> None:
        import torch
        import transformers

        config = transformers.AutoConfig.from_pretrained(tiny_model(TASK))
        config.num_hidden_layers = 4
        torch.manual_seed(0)
        model = transformers.AutoModelForSequenceClassification.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0.0, 0.15)
        model.eval().save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(tiny_model(TASK)).save_pretrained(folder)

    return make_once(shared_folder(tmp_path_factory) / "bert-of-four-layers", build)


def compiled(bert: Path, target: str, in_process: InProcess, out_dir: Path) -> Path:
    dynamic = get_target(target).capabilities.dynamic_axes
    buckets = () if dynamic else (ShapeBucket(batch_size=2, sequence_length=16),)
    component = ComponentSpec(shape_buckets=buckets)
    return in_process.compile(bert, out_dir, target=target, hf_task=TASK, components=[component])


def disturb(weight: Any) -> None:
    import torch

    weight.data += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))


def disturb_source(bert: Path, module: str, folder: Path) -> Path:
    from safetensors.torch import load_file, save_file

    shutil.copytree(bert, folder)
    weights = load_file(folder / "model.safetensors")
    disturb(weights[f"{module}.weight"])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def case(rows: int = 2, length: int = 16) -> Case:
    ids = np.random.default_rng(0).integers(10, 500, (rows, length))
    mask = np.ones_like(ids)
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    return Case("random tokens", "length", ("",) * rows, inputs, mask)


def diverge(source_dir: Path, artifact_dir: Path, failing: Case | None, task: HfTask = TASK) -> Divergence:
    artifact = open_artifact(artifact_dir, require_signature=False)
    component = LoadedComponent.load(artifact, threads=1)
    source_model = load_source_model(source_dir, task)
    record = artifact.component("default")
    return first_divergence(artifact, component, record, source_model, failing, threads=1)


def test_fault_in_a_module_of_a_traced_graph_is_named(bert: Path, in_process: InProcess, tmp_path: Path) -> None:
    import torch

    artifact_dir = compiled(bert, "torchscript", in_process, tmp_path / "artifact")
    path = artifact_dir / "components" / "default" / "model.pt"
    healthy = path.read_bytes()
    found = {}
    for module in FAULTY_MODULES:
        path.write_bytes(healthy)
        buckets = torch.jit.load(str(path))  # type: ignore[no-untyped-call]
        disturb(dict(buckets.named_parameters())[f"bucket_2x16.model.{module}.weight"])
        torch.jit.save(buckets, str(path))  # type: ignore[no-untyped-call]
        reseal(artifact_dir)
        found[module] = diverge(bert, artifact_dir, case())
    assert {module: divergence.module for module, divergence in found.items()} == {
        module: module for module in FAULTY_MODULES
    }
    key = found[f"{LAYER}.attention.self.key"]
    assert (key.kind, key.last_equal, key.note) == ("Linear", f"{LAYER}.attention.self.query", "")
    assert key.called_at.startswith("transformers/models/bert/modeling_bert.py:")
    assert key.inputs == ((2, 16, 32),)
    assert key.output == (2, 16, 32)
    assert key.statistics["min"] < key.statistics["mean"] < key.statistics["max"]
    assert key.difference is not None
    assert key.floor is not None
    assert 0.1 < key.difference < 0.7
    assert 0.0 < key.floor < 1e-6


def test_fault_in_the_first_module_is_named_although_nothing_is_equal(
    tiny_model: ModelFactory, in_process: InProcess, tmp_path: Path
) -> None:
    task, module = HfTask.IMAGE_CLASSIFICATION, "vit.embeddings.patch_embeddings.projection"
    vit = tiny_model(task)
    component = ComponentSpec(shape_buckets=(ShapeBucket(batch_size=2, sequence_length=1),))
    faulty = disturb_source(vit, module, tmp_path / "source")
    artifact_dir = in_process.compile(
        faulty, tmp_path / "artifact", target="torchscript", hf_task=task, components=[component]
    )
    pixels = np.random.default_rng(0).standard_normal((2, 3, 32, 32), dtype=np.float32)
    failing = Case("noise", "batch", ("", ""), {"pixel_values": pixels}, np.ones((2, 1)))
    divergence = diverge(vit, artifact_dir, failing, task=task)
    assert (divergence.module, divergence.kind, divergence.note) == (module, "Conv2d", "")
    assert (divergence.last_equal, divergence.unseen) == ("", ())


def test_modules_that_compute_weights_are_left_out() -> None:
    import torch

    convolution = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(2, 2, 1))
    model = torch.nn.Sequential(convolution, torch.nn.ReLU())
    root = trace_modules(model, {"input": torch.ones(1, 2, 3)}, Positions(None))
    assert [call.name for call in root.walk()] == ["0", "1", ""]


def test_module_that_reads_an_output_in_a_tuple_is_one_of_its_readers() -> None:
    import torch

    class Layer(torch.nn.Module):
        def forward(self, hidden: torch.Tensor, positions: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            return hidden * positions[0] + positions[1]

    class Table(torch.nn.Module):
        def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return hidden.cos(), hidden.sin()

    class Turning(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.layer = Table(), Layer()

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            answer: torch.Tensor = self.layer(hidden, positions=self.table(hidden))
            return answer

    root = trace_modules(Turning(), {"hidden": torch.rand(2, 4)}, Positions(None))
    table, layer = root.children
    assert (table.name, table.readers) == ("table", [layer])
    # A graph that shows neither may compute the table in another shape.
    assert _Tree(root, Precision.FP32).first() is layer


def test_output_that_is_changed_in_place_is_found_in_the_graph() -> None:
    import torch

    class Cutting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)

        def forward(self, values: torch.Tensor) -> torch.Tensor:
            hidden = self.first(values)
            hidden[:, 1:] = 0
            answer: torch.Tensor = self.last(hidden)
            return answer

    model, values = Cutting(), torch.rand(2, 4, 3)
    root = trace_modules(model, {"values": values}, Positions(None))
    shown = model.first(values)
    shown[:, 1:] = 0
    Matcher(root, Positions(None)).add({"hidden": shown.detach().numpy()})
    assert {call.name: call.nearest < 1e-6 for call in root.walk()} == {"first": True, "last": False, "": False}


def test_what_cannot_be_told_says_why(bert: Path, in_process: InProcess, tmp_path: Path) -> None:
    artifact_dir = compiled(bert, "torchscript", in_process, tmp_path / "artifact")
    outside = diverge(bert, artifact_dir, None)
    assert (outside.module, outside.place) == (None, "")
    assert "the fault is outside of it" in outside.note
    healthy = diverge(bert, artifact_dir, case())
    assert healthy.module is None
    assert healthy.note == "The difference does not show when the case is answered again."


@pytest.mark.slow
@pytest.mark.parametrize("target", [OnnxRuntimeTarget.name, OpenVinoTarget.name])
@pytest.mark.parametrize("module", [f"{LAYER}.attention.self.key", f"{LAYER}.output.LayerNorm"])
def test_fault_in_a_layer_of_an_exported_graph_is_named(
    bert: Path, in_process: InProcess, tmp_path: Path, target: str, module: str
) -> None:
    faulty = disturb_source(bert, module, tmp_path / "source")
    artifact_dir = compiled(faulty, target, in_process, tmp_path / "artifact")
    divergence = diverge(bert, artifact_dir, case())
    assert (divergence.module, divergence.note) == (module, "")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx-runtime", "openvino", "torchscript"])
def test_tensors_of_a_graph_come_in_parts_and_end_with_its_outputs(
    bert: Path, in_process: InProcess, tmp_path: Path, target: str
) -> None:
    artifact = open_artifact(compiled(bert, target, in_process, tmp_path / "artifact"), require_signature=False)
    record = artifact.component("default")
    inputs: Mapping[str, Any] = case().inputs
    parts = list(
        get_target(target).observe(artifact.folder / record.folder, record, inputs, threads=1, parts=3)  # type: ignore[attr-defined]
    )
    assert len(parts) == 4
    outputs = artifact.load(record, device=None, threads=1).run(inputs)
    assert parts[-1].keys() == outputs.keys()
    np.testing.assert_allclose(parts[-1]["logits"], outputs["logits"], atol=1e-6)
    source_model = load_source_model(bert, TASK)
    states = source_model.model.bert(**{name: _tensor(value) for name, value in inputs.items()})[0]
    same = [
        value
        for part in parts
        for value in part.values()
        if value.shape == tuple(states.shape) and np.allclose(value, states.detach().numpy(), atol=1e-5)
    ]
    assert same


def _tensor(value: Any) -> Any:
    import torch

    return torch.as_tensor(value)
