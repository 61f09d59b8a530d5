"""`python -m flows run`: each project with a small local model, single steps, and the folders of outputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from compileflow import CompiledPipeline
from compileflow.catalog import open_registry
from compileflow.settings import get_settings
from compileflow.spec import HfTask
from flows import run_project
from flows.commands import app
from flows.projects import load_project
from tests.models import build_model
from tests.steps import Pipeline

Run = Callable[..., Result]
STEPS = ("download", "compile", "validate", "upload")


@pytest.fixture(scope="module")
def local_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Build a small model for a project, once for all tests of this file."""
    root = tmp_path_factory.mktemp("models")

    def build(project: str) -> Path:
        folder = root / project
        hf_task = load_project(project).request.hf_task
        assert isinstance(hf_task, HfTask)
        return folder if folder.is_dir() else build_model(folder, hf_task, max_tokens=256)

    return build


@pytest.fixture
def run(
    pipeline: Pipeline, local_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Run:
    """Run a project with its local model, with the store, the registry and the outputs below the test's folder."""
    # Prefect is already imported, and talks to the server of the test run.
    monkeypatch.setattr(run_project, "set_embedded_defaults", lambda *_, **__: None)
    monkeypatch.setenv("COMPILEFLOW_OUTPUTS", str(tmp_path / "outputs"))
    get_settings.cache_clear()

    def call(project: str, *options: str) -> Result:
        return CliRunner().invoke(app, ["run", project, "--model", str(local_model(project)), *options])

    return call


def outputs(tmp_path: Path, project: str) -> dict[str, list[str]]:
    """Return the names in each folder of a project's outputs."""
    folders = {step: tmp_path / "outputs" / step / project for step in STEPS}
    return {
        step: sorted(path.name for path in folder.iterdir()) for step, folder in folders.items() if folder.is_dir()
    }


@pytest.mark.slow
@pytest.mark.parametrize("project", ["keywords", "ner", "sentiment"])
def test_project_runs_whole_and_fills_every_folder(
    project: str, run: Run, pipeline: Pipeline, tmp_path: Path, local_model: Callable[[str], Path]
) -> None:
    result = run(project)
    assert result.exit_code == 0, result.output
    assert outputs(tmp_path, project) == {
        "download": ["source.json"],
        "compile": ["artifact", "artifact.json"],
        "validate": ["report", "verdict.json"],
        "upload": ["version.json"],
    }
    folders = {step: tmp_path / "outputs" / step / project for step in STEPS}
    assert json.loads((folders["download"] / "source.json").read_text())["uri"] == local_model(project).as_uri()
    version = open_registry(pipeline.registry_uri).get(project, 1)
    assert json.loads((folders["upload"] / "version.json").read_text()) == version.model_dump(mode="json")
    assert (folders["validate"] / "report" / "report.html").is_file()
    # The folder of the artifact is a compiled model.
    components = [component.name for component in load_project(project).request.components] or ["default"]
    for component in components:
        loaded = CompiledPipeline.from_pretrained(folders["compile"] / "artifact", component=component)
        assert loaded("a good day")


@pytest.mark.slow
def test_single_steps_in_turn_do_what_the_whole_run_does(run: Run, pipeline: Pipeline, tmp_path: Path) -> None:
    filled: list[str] = []
    for task, step in zip(run_project.STEPS, STEPS, strict=True):
        result = run("ner", "--task", task)
        assert result.exit_code == 0, result.output
        filled.append(step)
        assert list(outputs(tmp_path, "ner")) == filled
        assert f"outputs: {tmp_path / 'outputs' / step / 'ner'}" in result.output.replace("\n", "")
    assert open_registry(pipeline.registry_uri).get("ner", 1).verdict == "pass"
    assert pipeline.counts == {"compile": 1, "validate": 1}


def test_step_without_what_comes_before_it_says_which_step_to_run(
    run: Run, tmp_path: Path, local_model: Callable[[str], Path]
) -> None:
    """Each step is the first one that was not run when the next step asks for it."""
    first_missing = {
        "compile-model": ("has no source model", "--task download-model"),
        "validate-model": ("has no artifact", "--task compile-model"),
        "upload-model": ("has no report", "--task validate-model"),
    }
    done = ["download-model", "compile-model"]
    assert run("ner", "--task", "upload-model").exit_code == 1
    for task, parts in first_missing.items():
        result = run("ner", "--task", task)
        assert result.exit_code == 1
        error = next(line for line in result.output.splitlines() if line.startswith("error: "))
        for part in (*parts, f"Run first: python -m flows run ner --model {local_model('ner')} --task "):
            assert part in error
        if done:
            assert run("ner", "--task", done.pop(0)).exit_code == 0
    assert "has no report" in (tmp_path / "outputs" / "upload" / "ner" / "error.txt").read_text()


def test_switches_in_the_environment_choose_the_steps(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "No step is switched on" in run("ner", "--from-environment").output
    monkeypatch.setenv("COMPILE_PIPELINE_EXECUTION_DOWNLOAD", "true")
    monkeypatch.setenv("COMPILE_PIPELINE_EXECUTION_COMPILE", "true")
    get_settings.cache_clear()
    result = run("ner", "--from-environment")
    assert result.exit_code == 0, result.output
    assert list(outputs(tmp_path, "ner")) == ["download", "compile"]


def test_refused_artifact_leaves_its_report_and_no_version(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local_model: Callable[[str], Path]
) -> None:
    project = tmp_path / "slow.yaml"
    project.write_text(
        "model: m\ntarget: torchscript\nmax_sequence_length: 16\n"
        "validation: {max_latency_ratio: 1.0e-6, latency_pairs: 5}\n"
    )
    result = CliRunner().invoke(app, ["run", str(project), "--model", str(local_model("sentiment"))])
    assert result.exit_code == 1
    assert outputs(tmp_path, "slow") == {
        "download": ["source.json"],
        "compile": ["artifact", "artifact.json"],
        "validate": ["report", "verdict.json"],
        "upload": ["error.txt"],
    }
    assert (
        (tmp_path / "outputs" / "upload" / "slow" / "error.txt")
        .read_text()
        .startswith("The verdict is fail: latency_ratio")
    )


def test_run_that_is_refused_before_it_starts_leaves_only_its_error(
    run: Run, tmp_path: Path, local_model: Callable[[str], Path]
) -> None:
    for step in STEPS:
        (tmp_path / "outputs" / step / "long").mkdir(parents=True)
        (tmp_path / "outputs" / step / "long" / "older.json").touch()
    project = tmp_path / "long.yaml"
    project.write_text("model: m\ntarget: torchscript\nmax_sequence_length: 4096\n")
    result = CliRunner().invoke(app, ["run", str(project), "--model", str(local_model("sentiment"))])
    assert result.exit_code == 2
    assert outputs(tmp_path, "long") == {"download": ["error.txt"]}
    assert "4096" in (tmp_path / "outputs" / "download" / "long" / "error.txt").read_text()
    # A single step leaves the folders of the others alone.
    (tmp_path / "outputs" / "download" / "long" / "error.txt").rename(tmp_path / "error.txt")
    words = ["run", str(project), "--model", str(local_model("sentiment")), "--task", "compile-model"]
    assert CliRunner().invoke(app, words).exit_code == 1
    assert outputs(tmp_path, "long") == {"download": [], "compile": ["error.txt"]}


@pytest.mark.parametrize(
    ("section", "field", "text"),
    [
        ("validation", "examples_path", "Check the path of {field} of {project}."),
        ("validation", "suite_path", "Check the path of {field} of {project}."),
        ("validation", "tests_path", "Check {field} of {project}."),
    ],
)
def test_error_about_a_file_names_the_field_of_the_project_file(
    section: str, field: str, text: str, run: Run, tmp_path: Path, local_model: Callable[[str], Path]
) -> None:
    project = tmp_path / "wrong.yaml"
    project.write_text(f"model: m\ntarget: torchscript\nmax_sequence_length: 16\n{section}: {{{field}: nope}}\n")
    result = CliRunner().invoke(app, ["run", str(project), "--model", str(local_model("sentiment"))])
    assert result.exit_code == 2
    error = (tmp_path / "outputs" / "download" / "wrong" / "error.txt").read_text()
    assert str(tmp_path / "nope") in error
    assert error.endswith(text.format(field=f"{section}.{field}", project=project) + "\n")
    assert "--" not in result.output
