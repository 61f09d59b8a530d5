"""README and docs are true: their code runs, their tables are fresh, their links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compileflow.artifact.open import copy_artifact, open_artifact
from compileflow.settings import Settings
from compileflow.spec import HfTask
from tests.conftest import ModelFactory
from tests.steps import in_process

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Another test runs these commands, or they change an environment.
NOT_RUN = ("pip install", "prefect work-pool", "prefect --no-prompt deploy", "prefect worker", "ARTIFACT=")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture
def workspace(
    settings: Settings, tiny_model: ModelFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder with everything that the pages' commands and code name."""
    folder = tmp_path / "workspace"
    (folder / "compiled").mkdir(parents=True)
    model = tiny_model(HfTask.FEATURE_EXTRACTION)
    (folder / "my-model").symlink_to(model)
    shutil.copyfile(ROOT / "src/compileflow/validation/data/sentences_en.txt", folder / "examples.txt")
    with in_process(settings, monkeypatch) as pipeline:
        artifact = pipeline.compile(pipeline.request(model))
    copy_artifact(open_artifact(artifact.uri, settings=settings), folder / "compiled" / "my-model")
    return folder


def test_python_of_the_readme_runs(
    settings: Settings, workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    python_blocks = blocks(ROOT / "README.md", "python")
    assert python_blocks
    monkeypatch.chdir(workspace)
    with in_process(settings, monkeypatch) as pipeline:
        for block in python_blocks:
            exec(compile(block, "README.md", "exec"), {})  # noqa: S102 - our own README
    assert "BaseModelOutput" in capsys.readouterr().out
    # The first of two calls compiles and validates; the second only loads.
    assert pipeline.counts == {"compile": 1, "validate": 1}


def commands(page: Path) -> list[str]:
    """Return the commands of a page that this file runs."""
    lines = [line for block in blocks(page, "console") for line in block.splitlines()]
    return [line for line in lines if not line.startswith(NOT_RUN)]


@pytest.mark.parametrize(
    ("page", "server"),
    [
        pytest.param("README.md", "the run's", id="README"),
        pytest.param("README.md", "embedded", id="README, embedded server", marks=pytest.mark.slow),
        pytest.param("docs/getting-started.md", "none", id="getting started", marks=pytest.mark.slow),
        pytest.param("docs/how-to/compile-a-model.md", "the run's", id="compile", marks=pytest.mark.slow),
        pytest.param(
            "docs/how-to/validate-on-your-own-examples.md", "none", id="validate", marks=pytest.mark.slow
        ),
    ],
)
def test_commands_run(
    settings: Settings, workspace: Path, request: pytest.FixtureRequest, page: str, server: str
) -> None:
    if server == "the run's":
        request.getfixturevalue("flows_on_server")
    environment = os.environ | {"COMPILEFLOW_HOME": str(settings.home_dir), "PYTHONPATH": str(ROOT)}
    lines = commands(ROOT / page)
    assert any("compile" in line for line in lines)
    for line in lines:
        words = shlex.split(line)
        if words[0] == "make":
            words = ["make", "-C", str(ROOT), "--dry-run", *words[1:]]
        elif words[0] == "compileflow":
            words = [sys.executable, "-m", "compileflow", *words[1:]]
        elif words[0] == "python":
            words[0] = sys.executable
        if "auto" in words:
            # All candidates take minutes; two are enough to see that the command is right.
            words += ["--among", "torchscript", "--among", "onnx-runtime", "--precision", "fp32"]
        process = subprocess.run(
            words, cwd=workspace, env=environment, capture_output=True, text=True, timeout=300
        )
        assert process.returncode == 0, f"{line}\n{process.stdout}{process.stderr}"


def test_prefect_commands_of_the_readme_are_those_that_the_deployment_test_runs() -> None:
    shown = "\n".join(blocks(ROOT / "README.md", "console"))
    for line in (
        "--no-prompt deploy --all --prefect-file deployments/prefect.yaml",
        "create compileflow --type process",
    ):
        assert line in shown
        assert line in (ROOT / "deployments" / "prefect.yaml").read_text("utf-8")


def test_tables_from_code_are_fresh() -> None:
    process = subprocess.run(
        [sys.executable, "docs/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8")):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link
