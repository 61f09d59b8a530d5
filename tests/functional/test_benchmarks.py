"""The benchmarks run, each on a small model, as they are run by hand: from the repository's root."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from compileflow.settings import Settings
from compileflow.spec import HfTask
from tests.conftest import ModelFactory
from tests.models import MAX_TOKENS

ROOT = Path(__file__).parents[2]
SCRIPTS = {
    "exp_targets": ("--shape", "1x16", "--rounds", "3", "--among", "torchscript"),
    "exp_text_stream": ("--sentences", "50", "--among", "torchscript", "--tokens", str(MAX_TOKENS)),
    "exp_wrapper_overhead": ("--blocks", "2", "--calls", "4", "--target", "torchscript"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_benchmark_runs_from_the_repository_and_prints_a_table_and_json(
    settings: Settings, tiny_model: ModelFactory, name: str
) -> None:
    model = tiny_model(HfTask.FEATURE_EXTRACTION)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, f"benchmarks/{name}.py", "--model", str(model), *SCRIPTS[name]],
        cwd=ROOT,
        env=environment | {"COMPILEFLOW_HOME": str(settings.home_dir)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["environment"]["torch"]
    compiled = [result for result in answer["results"] if "torchscript" in result]
    assert compiled
    for result in compiled:
        assert f"| {result} |" in done.stderr


def test_every_benchmark_is_run_here() -> None:
    assert set(SCRIPTS) == {path.stem for path in (ROOT / "benchmarks").glob("exp_*.py")}
