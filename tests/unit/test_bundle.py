"""The bundle of a failed validation: its script shows the failure where only the artifact and the wheel are."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compileflow._process.folders import path_of_uri
from compileflow.spec import ComponentSpec, HfTask, ShapeBucket
from compileflow.steps.reproduce import reproduce
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


def test_gate_that_needs_the_source_model_is_shown_with_a_folder_of_it(
    tiny_model: ModelFactory,
    in_process: InProcess,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    task = HfTask.TEXT_CLASSIFICATION
    source_dir = Path(shutil.copytree(tiny_model(task), tmp_path / "source"))
    artifact_dir = in_process.compile(source_dir, tmp_path / "artifact", target="torchscript", hf_task=task)
    config = json.loads((artifact_dir / "config.json").read_text("utf-8"))
    config["id2label"]["0"], config["id2label"]["1"] = config["id2label"]["1"], config["id2label"]["0"]
    (artifact_dir / "config.json").write_text(json.dumps(config), "utf-8")
    reseal(artifact_dir)
    proof = validate_here(source_dir, artifact_dir, tmp_path / "report")
    assert proof.report["failure"]["gate"] == "interface_files"
    source_dir.rename(tmp_path / "moved")
    script = runpy.run_path(str(tmp_path / "report" / "bundle" / "reproduce.py"))

    def shown(*words: str) -> tuple[int, str, str]:
        arguments = [str(artifact_dir), *words]
        code = reproduce(script["FAILURE"], script["ARRAYS"], folder=tmp_path, arguments=arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    code, out, _ = shown("--source", str(tmp_path / "moved"))
    assert (code, out.splitlines()[-1]) == (1, "interface_files: 1, the limit is at most 0; the report says 1")
    code, _, err = shown()
    assert (code, err.splitlines()) == (2, [err.strip()])
    assert "not on this machine. Give its folder: python reproduce.py ARTIFACT --source FOLDER" in err
    code, _, err = shown("--source", str(tmp_path))
    assert (code, err) == (
        2, f"error: {tmp_path} has no config.json. Give the folder of the source model.\n"
    )  # fmt: skip

    def crash(request: Any) -> None:
        raise ValueError(f"cannot read {request['source_dir']}")

    monkeypatch.setattr("compileflow.steps.prove.prove_artifact", crash)
    code, _, err = shown("--source", str(tmp_path / "moved"))
    assert code == 2, "1 would mean that the failure shows"
    assert err.endswith(f"ValueError: cannot read {tmp_path / 'moved'}\n")


def test_failing_case_is_shown_where_the_libraries_of_a_validation_are_missing(
    failed: tuple[Path, Path, Proof], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact_dir, report_dir, _ = failed
    script = runpy.run_path(str(report_dir / "bundle" / "reproduce.py"))
    content = json.loads(script["FAILURE"])
    content["failure"]["gate"] = "label_agreement"
    assert path_of_uri(content["subject"]["source_uri"]).is_dir()
    monkeypatch.setattr("compileflow.steps.validate.installed_versions", lambda names: {})

    code = reproduce(json.dumps(content), script["ARRAYS"], folder=report_dir, arguments=[str(artifact_dir)])

    assert code == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("max_abs_diff of logits, case ")
