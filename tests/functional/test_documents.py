"""README and docs say what is so: their code runs, their tables are fresh, their links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
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
# Started by a test of their own, or about another project's environment.
ELSEWHERE = ("pip install", "prefect work-pool", "prefect --no-prompt deploy", "prefect worker")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture
def workspace(
    settings: Settings, tiny_model: ModelFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder with what README's commands and code name: my-model and compiled/my-model."""
    folder = tmp_path / "workspace"
    (folder / "compiled").mkdir(parents=True)
    model = tiny_model(HfTask.FEATURE_EXTRACTION)
    (folder / "my-model").symlink_to(model)
    with in_process(settings, monkeypatch) as pipeline:
        artifact = pipeline.compile(pipeline.request(model))
    copy_artifact(open_artifact(artifact.uri, settings=settings), folder / "compiled" / "my-model")
    return folder


def test_python_of_the_readme_runs(
    settings: Settings, workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    found = blocks(ROOT / "README.md", "python")
    assert found
    monkeypatch.chdir(workspace)
    with in_process(settings, monkeypatch) as pipeline:
        for block in found:
            exec(compile(block, "README.md", "exec"), {})  # noqa: S102 - our own README
    assert "BaseModelOutput" in capsys.readouterr().out
    # What the first of two calls compiles and proves, the second loads.
    assert pipeline.counts == {"compile": 1, "validate": 1}


@pytest.mark.parametrize(
    ("auto", "server"),
    [
        pytest.param(False, "the run's", id="the run's server"),
        pytest.param(False, "embedded", id="embedded server", marks=pytest.mark.slow),
        pytest.param(True, "embedded", id="auto", marks=pytest.mark.slow),
    ],
)
def test_commands_of_the_readme_run(
    settings: Settings, workspace: Path, request: pytest.FixtureRequest, auto: bool, server: str
) -> None:
    if server != "embedded":
        request.getfixturevalue("flows_on_server")
    environment = os.environ | {"COMPILEFLOW_HOME": str(settings.home_dir), "PYTHONPATH": str(ROOT)}
    ran = []
    for block in blocks(ROOT / "README.md", "console"):
        for line in block.splitlines():
            words = shlex.split(line)
            if line.startswith(ELSEWHERE) or ("auto" in words) is not auto:
                continue
            if words[0] == "make":
                words = ["make", "-C", str(ROOT), "--dry-run", *words[1:]]
            elif words[0] == "compileflow":
                words = [sys.executable, "-m", "compileflow.cli", *words[1:]]
            elif words[0] == "python":
                words[0] = sys.executable
            if auto:
                # All candidates take minutes; two are enough to see that the command is right.
                words += ["--among", "torchscript", "--among", "onnx-runtime", "--precision", "fp32"]
            done = subprocess.run(
                words, cwd=workspace, env=environment, capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
            ran.append(line)
    assert any(line.startswith("python -m flows compile") for line in ran)
    assert ("make demo" in ran) is not auto


def test_prefect_commands_of_the_readme_are_those_that_the_deployment_test_runs() -> None:
    shown = "\n".join(blocks(ROOT / "README.md", "console"))
    for line in (
        "--no-prompt deploy --all --prefect-file deployments/prefect.yaml",
        "create compileflow --type process",
    ):
        assert line in shown
        assert line in (ROOT / "deployments" / "prefect.yaml").read_text("utf-8")


def test_tables_from_code_are_fresh() -> None:
    done = subprocess.run(
        [sys.executable, "docs/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8")):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link
