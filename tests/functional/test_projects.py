"""`make run` as people type it, in processes of its own."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from compileflow.spec import HfTask
from tests.models import build_model

pytestmark = [pytest.mark.functional, pytest.mark.usefixtures("flows_on_server")]
ROOT = Path(__file__).parents[2]


def make(*words: str, outputs: Path) -> subprocess.CompletedProcess[str]:
    """Run the command of `make run` with this interpreter, in the place of that of make's own environment."""
    dry_run = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", "run", *words],
        cwd=ROOT,
        # Where make runs the tests, its own flags are in the environment.
        env={
            name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
        },
        capture_output=True,
        text=True,
        check=True,
    )
    _, *command = shlex.split(dry_run.stdout.splitlines()[-1])
    environment = os.environ | {
        "COMPILEFLOW_HOME": str(outputs.parent / "home"),
        "COMPILEFLOW_OUTPUTS": str(outputs),
        "NO_COLOR": "1",
    }
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )


@pytest.mark.slow
def test_make_run_compiles_a_project_and_each_of_its_tasks_alone(tmp_path: Path) -> None:
    model = build_model(tmp_path / "my model", HfTask.TOKEN_CLASSIFICATION, max_tokens=128)
    download = make("PROJECT=ner", "TASK=download-model", f"MODEL={model}", outputs=tmp_path / "outputs")
    assert download.returncode == 0, download.stderr
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["download"]
    whole = make("PROJECT=ner", f"MODEL={model}", outputs=tmp_path / "outputs")
    assert whole.returncode == 0, whole.stderr
    assert "ner version 1" in whole.stdout
    assert {path.name for path in (tmp_path / "outputs").iterdir()} == {
        "download",
        "compile",
        "validate",
        "upload",
    }


def test_make_run_without_a_project_says_so(tmp_path: Path) -> None:
    completed = make(outputs=tmp_path / "outputs")
    assert completed.returncode == 2
    assert "PROJECT" in completed.stderr
