"""Each benchmark runs on small inputs, from the root of the repository, as it is run by hand."""

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
    "exp_list_calls": ("--target", "torchscript", "--items", "40", "--rounds", "2"),
    "exp_targets": ("--shape", "1x16", "--rounds", "3", "--among", "torchscript"),
    "exp_text_stream": ("--sentences", "50", "--among", "torchscript", "--tokens", str(MAX_TOKENS)),
    "exp_validation_cost": ("--among", "torchscript", "--runs", "alone", "first"),
    "exp_wrapper_overhead": ("--blocks", "2", "--calls", "4", "--target", "torchscript"),
}
S3_THROUGHPUT = "exp_s3_throughput"


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_benchmark_runs_from_the_repository_and_prints_a_table_and_json(
    settings: Settings, tiny_model: ModelFactory, name: str
) -> None:
    model = tiny_model(HfTask.FEATURE_EXTRACTION)
    done = run_benchmark(name, "--model", str(model), *SCRIPTS[name], settings=settings)
    answer = json.loads(done.stdout)
    assert answer["environment"]["torch"]
    compiled = [result for result in answer["results"] if "torchscript" in result]
    assert compiled
    for result in compiled:
        assert f"| {result} |" in done.stderr


def test_s3_benchmark_compares_the_store_with_boto3_both_ways(settings: Settings) -> None:
    done = run_benchmark(S3_THROUGHPUT, "--megabytes", "2", "--files", "10", "--rounds", "1", settings=settings)
    answer = json.loads(done.stdout)
    assert answer["environment"]["moto"]
    assert answer["size_bytes"] == pytest.approx(2e6, abs=20)
    assert all(answer["times_as_fast"][way] > 0 for way in ("up", "down"))
    for result in answer["results"]:
        assert f"| {result} |" in done.stderr


def run_benchmark(name: str, *arguments: str, settings: Settings) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, f"benchmarks/{name}.py", *arguments],
        cwd=ROOT,
        env=environment | {"COMPILEFLOW_HOME": str(settings.home_dir)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_every_benchmark_is_run_here() -> None:
    assert {*SCRIPTS, S3_THROUGHPUT} == {path.stem for path in (ROOT / "benchmarks").glob("exp_*.py")}
