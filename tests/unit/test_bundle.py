"""The bundle of a failed validation: its script shows the failure where only the artifact and the wheel are."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from compileflow.spec import ComponentSpec, HfTask, ShapeBucket
from tests.conftest import ModelFactory
from tests.in_process import InProcess
from tests.unit.proving import Proof, reseal, validate_here

# Of the extra "validation", and what only a compile needs.
_ABSENT = ("great_expectations", "jinja2", "matplotlib", "pandas", "scipy", "yaml", "onnx", "openvino", "nncf")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(r"ignore:.*torch\.jit\..*deprecated:DeprecationWarning"),
]


@pytest.fixture
def failed(tiny_model: ModelFactory, in_process: InProcess, tmp_path: Path) -> tuple[Path, Path, Proof]:
    """An artifact with a fault in its first layer, the folder of its report, and the report."""
    import torch

    source_dir, task = tiny_model(HfTask.TEXT_CLASSIFICATION), HfTask.TEXT_CLASSIFICATION
    component = ComponentSpec(shape_buckets=(ShapeBucket(batch_size=2, sequence_length=32),))
    artifact_dir = in_process.compile(
        source_dir, tmp_path / "artifact", target="torchscript", hf_task=task, components=[component]
    )
    path = artifact_dir / "components" / "default" / "model.pt"
    buckets = torch.jit.load(str(path))  # type: ignore[no-untyped-call]
    weight = dict(buckets.named_parameters())["bucket_2x32.model.bert.encoder.layer.0.intermediate.dense.weight"]
    weight.data += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    torch.jit.save(buckets, str(path))  # type: ignore[no-untyped-call]
    reseal(artifact_dir)
    report_dir = tmp_path / "report"
    return artifact_dir, report_dir, validate_here(source_dir, artifact_dir, report_dir)


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "reproduce.py", *words],
        cwd=folder, env=os.environ, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_script_alone_shows_the_figure_of_the_report_with_the_wheel_alone(
    failed: tuple[Path, Path, Proof], wheel_without_prefect: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact_dir, report_dir, proof = failed
    module = "bert.encoder.layer.0.intermediate.dense"
    assert proof.reason.endswith(f"; the outputs first differ in {module} (Linear)")
    assert proof.report["failure"]["divergence"]["module"] == module
    page = (report_dir / "report.html").read_text("utf-8")
    assert f"The outputs first differ in <b>{module} (Linear)</b>" in page

    bundle = report_dir / "bundle"
    names = {path.name for path in bundle.iterdir()}
    assert names == {"compiled.npz", "failure.json", "inputs.npz", "reference.npz", "reproduce.py"}
    assert json.loads((bundle / "failure.json").read_text("utf-8"))["spec"]["target"] == "torchscript"
    reference, compiled = (np.load(bundle / name)["logits"] for name in ("reference.npz", "compiled.npz"))
    assert np.abs(reference - compiled).max() > 1e-4

    for name in _ABSENT:
        (wheel_without_prefect / f"{name}.py").write_text(f'raise ImportError("{name} is not installed")\n')
    monkeypatch.setenv("COMPILEFLOW_HOME", str(tmp_path / "home"))
    moved = shutil.move(artifact_dir, tmp_path / "elsewhere")
    folder = tmp_path / "empty"
    folder.mkdir()
    shutil.copy(bundle / "reproduce.py", folder)
    completed = run(folder, str(moved))
    assert completed.returncode == 1, completed.stderr
    first, line = completed.stdout.splitlines()
    assert proof.reason in first
    measured = f"{proof.gate('max_abs_diff')['measured']:.4g}"
    assert line.startswith("max_abs_diff of logits, case ")
    assert f": {measured}, the limit is at most" in line
    assert line.endswith(f"the report says {measured}")

    missing = run(folder)
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: ")
    assert len(missing.stderr.splitlines()) == 1
