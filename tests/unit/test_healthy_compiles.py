"""No false alarm: healthy compiles of every architecture, task and target pass all gates."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from compileflow.catalog import get_target
from compileflow.spec import GRAPH_TASKS, ComponentSpec, HfTask
from tests.conftest import ModelFactory
from tests.in_process import InProcess
from tests.models import ARCHITECTURES, SIGNAL_TASKS, TEXT_GRAPHS
from tests.unit.proving import validate_here

pytestmark = pytest.mark.filterwarnings(r"ignore:.*torch\.jit\..*deprecated")

# Static buckets compile in a moment and always see padding; ONNX exports take seconds each.
_LONG = (HfTask.DEPTH_ESTIMATION, HfTask.ZERO_SHOT_IMAGE_CLASSIFICATION)
_QUICK = [
    ("bert", task, "torchscript")
    for task in GRAPH_TASKS
    if task.modality != "audio" and task not in _LONG and not task.generates
]
_SLOW = [
    case for case in product(ARCHITECTURES, TEXT_GRAPHS, ("onnx-runtime", "torchscript")) if case not in _QUICK
] + [("bert", task, target) for task in SIGNAL_TASKS for target in ("onnx-runtime", "openvino")]
_SLOW += [
    ("bert", task, "torchscript")
    for task in GRAPH_TASKS
    if (task.modality == "audio" or task in _LONG) and task in get_target("torchscript").capabilities.hf_tasks
]


@pytest.mark.parametrize(
    ("architecture", "hf_task", "target"),
    [*_QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in _SLOW)],
)
def test_a_healthy_compile_passes_every_gate(
    tiny_model: ModelFactory,
    in_process: InProcess,
    tmp_path: Path,
    architecture: str,
    hf_task: HfTask,
    target: str,
) -> None:
    source_dir = tiny_model(hf_task, architecture)
    artifact_dir = in_process.compile(source_dir, tmp_path / "artifact", target=target, hf_task=hf_task)
    # Rates of 0.99 need 268 decisions.
    proof = validate_here(source_dir, artifact_dir, tmp_path / "report", max_examples=300)
    assert proof.outcome == "pass", proof.reason
    judged = {gate["gate"] for gate in proof.report["verdict"]["gates"]}
    assert ("token_types_respected" in judged) is (architecture == "bert" and hf_task in TEXT_GRAPHS)
    has_mask = "image" not in hf_task.modality and hf_task is not HfTask.AUDIO_XVECTOR
    assert ("mask_respected" in judged) is has_mask


@pytest.mark.parametrize(
    ("longest", "target"), [pytest.param(12, "onnx-runtime", marks=pytest.mark.slow), (4, "torchscript")]
)
def test_a_maximum_below_the_usual_lengths_passes(
    tiny_model: ModelFactory, in_process: InProcess, tmp_path: Path, longest: int, target: str
) -> None:
    source_dir = tiny_model(HfTask.TEXT_CLASSIFICATION)
    artifact_dir = in_process.compile(
        source_dir,
        tmp_path / "artifact",
        target=target,
        hf_task=HfTask.TEXT_CLASSIFICATION,
        components=[ComponentSpec(max_sequence_length=longest)],
    )
    proof = validate_here(source_dir, artifact_dir, tmp_path / "report")
    assert proof.outcome == "pass", proof.reason
