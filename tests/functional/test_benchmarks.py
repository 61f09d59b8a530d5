"""Each benchmark runs on small inputs, from the root of the repository, as it is run by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig

from benchmarks.exp_peers import same_neighbours
from benchmarks.generation.weights import Operation, bytes_per_token
from benchmarks.peers.page import goal_rows
from compileflow.settings import Settings
from compileflow.spec import HfTask
from tests.conftest import ModelFactory
from tests.models import MAX_TOKENS

ROOT = Path(__file__).parents[2]
SCRIPTS = {
    "exp_concurrency": (
        *("--target", "torchscript", "--tokens", str(MAX_TOKENS), "--clients", "4"),
        *("--requests", "20", "--rounds", "2", "--memory-requests", "40"),
    ),
    "exp_list_calls": ("--target", "torchscript", "--items", "40", "--rounds", "2"),
    "exp_targets": ("--shape", "1x16", "--rounds", "3", "--among", "torchscript"),
    "exp_text_stream": ("--sentences", "50", "--among", "torchscript", "--tokens", str(MAX_TOKENS)),
    "exp_validation_cost": ("--among", "torchscript", "--runs", "alone", "first"),
    "exp_wrapper_overhead": ("--blocks", "2", "--calls", "4", "--target", "torchscript"),
}
S3_THROUGHPUT = "exp_s3_throughput"
GENERATION = "exp_generation"
FLOW_OVERHEAD = "exp_flow_overhead"
REGISTRY = "exp_registry"
PEERS = "exp_peers"


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


def test_s3_benchmark_compares_the_store_with_other_clients_both_ways(settings: Settings, tmp_path: Path) -> None:
    page = tmp_path / "transfers.md"
    words = ("--files", "10", "--file-kb", "20", "--large-mb", "2", "--rounds", "1", "--page", str(page))
    done = run_benchmark(S3_THROUGHPUT, *words, settings=settings)
    answer = json.loads(done.stdout)
    assert answer["environment"]["moto"]
    assert [case["size_bytes"] for case in answer["results"].values()] == [200_000, 2_000_000]
    for case in answer["results"].values():
        assert {"store", "boto3 TransferManager"} <= case["contestants"].keys()
        assert ("obstore" in case["contestants"]) == (answer["environment"]["obstore"] != "not installed")
        for name, row in case["contestants"].items():
            assert min(row.values()) > 0
            assert f"| {name} |" in done.stderr
            assert f"| {name} |" in page.read_text("utf-8")


@pytest.mark.slow
def test_registry_benchmark_times_each_registry_and_writes_a_page(settings: Settings, tmp_path: Path) -> None:
    page = tmp_path / "timings.md"
    done = run_benchmark(
        REGISTRY, "--versions", "10", "20", "--rounds", "1", "--page", str(page), settings=settings
    )
    answer = json.loads(done.stdout)
    for name in ("sqlite", "neptune", "mlflow"):
        assert list(answer["results"][name]) == ["10", "20"]
        assert all(figure > 0 for figures in answer["results"][name].values() for figure in figures.values())
        assert f"## {name}" in page.read_text()
    assert "| get NAME@N |" in done.stderr


@pytest.mark.slow
def test_generation_benchmark_compares_compiled_decoders_and_judges_goals(
    settings: Settings, tiny_model: ModelFactory, tmp_path: Path
) -> None:
    model = tiny_model(HfTask.TEXT_GENERATION)
    page = tmp_path / "page.md"
    sizes = ("--prompt", "8", "--tokens", "8", "--rounds", "2", "--no-random", "--only", "openvino fp32")
    done = run_benchmark(GENERATION, "--model", str(model), *sizes, "--page", str(page), settings=settings)
    [results] = json.loads(done.stdout)["results"].values()
    contenders = results["contenders"]
    assert contenders["openvino fp32"]["equal_tokens"] == [8, 8]
    # 64 features, 2 layers with 4 heads, 2 of them for keys and values, 128 inner features, and no tied table.
    # Beside the weights, the IR holds the rotary frequencies and a few numbers.
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64
    words = AutoConfig.from_pretrained(model).vocab_size
    weights = 4 * (2 * layer + 64 + 64 * words)
    assert contenders["eager fp32"]["bytes_per_token"] == weights
    assert contenders["openvino fp32"]["bytes_per_token"] == pytest.approx(weights, rel=0.01)
    assert "| openvino fp32 |" in done.stderr
    assert "## Goals" in page.read_text("utf-8")
    assert page.with_suffix(".svg").is_file()


@pytest.mark.slow
def test_race_of_peers_compares_speeds_neighbours_and_the_limit(
    settings: Settings, tiny_model: ModelFactory, tmp_path: Path
) -> None:
    model = tiny_model(HfTask.FEATURE_EXTRACTION)
    page = tmp_path / "performance.md"
    sizes = (
        "--minutes",
        "0",
        "--singles",
        "2",
        "--sentences",
        "12",
        "--paragraphs",
        "3",
        "--among",
        "onnx-runtime",
    )
    done = run_benchmark(PEERS, "--model", str(model), *sizes, "--page", str(page), settings=settings)
    answer = json.loads(done.stdout)
    # 32 features, 2 layers, 64 inner features; two operations for each weight.
    assert answer["operations_per_token"] == 2 * 2 * (4 * 32 * 32 + 2 * 32 * 64)
    assert answer["left_out"] == {}
    assert answer["rounds"] == 2
    compiled = answer["contestants"]["compileflow onnx-runtime fp32"]
    assert compiled["neighbours"] == 1
    assert "| sentence-transformers torch |" in done.stderr
    assert "at least 90% of the limit | compileflow onnx-runtime fp32 |" in page.read_text("utf-8")
    assert page.with_suffix(".svg").is_file()


def test_goals_of_the_race_compare_with_peers_that_keep_as_many_neighbours() -> None:
    def figures(rate: float, neighbours: float, *, is_peer: bool, limit: str = "") -> dict[str, Any]:
        spread = [rate, rate, rate]
        speeds = {"single": spread, "sentences": spread, "paragraphs": spread}
        return {**speeds, "neighbours": neighbours, "is_peer": is_peer, "limit": limit}

    answer = {
        # 20 tokens of 1,000 operations: at most 100 texts per second at fp32.
        "operations_per_token": 1000,
        "tokens": {"sentences": {"mean": 20}, "paragraphs": {"mean": 20}},
        "products_per_s": {"fp32": 2e6, "bf16": 4e6},
        "contestants": {
            "exact peer": figures(50, 1.0, is_peer=True),
            "fast peer": figures(200, 0.9, is_peer=True),
            "exact": figures(95, 1.0, is_peer=False, limit="fp32"),
            "rough": figures(250, 0.8, is_peer=False),
        },
    }

    assert goal_rows(answer)[1:] == [
        ("at least 90% of the limit", "exact", "95%", "95%", "yes"),
        (
            "at least 1.5 times the fastest peer with as many neighbours",
            "exact",
            *["1.90 times exact peer"] * 2,
            "yes",
        ),
        (
            "at least 1.5 times the fastest peer with as many neighbours",
            "rough",
            *["1.25 times fast peer"] * 2,
            "no",
        ),
    ]


def test_same_neighbours_are_counted_without_the_text_itself() -> None:
    # Two groups of eleven equal texts: the ten nearest of each text are the others of its group.
    groups = np.array([[1.0, 0.0]] * 11 + [[0.0, 1.0]] * 11)
    assert same_neighbours(groups, 2 * groups) == 1
    # One text of each group changes sides: it has other neighbours, and the 20 others have one other neighbour.
    changed = groups.copy()
    changed[[0, 11]] = groups[[11, 0]]
    assert same_neighbours(groups, changed) == pytest.approx(20 * 0.9 / 22)


@pytest.mark.slow
def test_overhead_benchmark_times_each_kind_of_run_and_keeps_the_figures(
    settings: Settings, tmp_path: Path
) -> None:
    results, page = tmp_path / "results.json", tmp_path / "flow-overhead.md"
    words = ("--part", "cached", "--rounds", "1", "--results", str(results))
    first = json.loads(run_benchmark(FLOW_OVERHEAD, *words, settings=settings).stdout)
    assert first["environment"]["prefect"]
    kinds = first["results"]["cached"]["kinds"]
    assert list(kinds) == ["library", "running server", "embedded server"]
    for flow in ("running server", "embedded server"):
        assert kinds[flow]["wall_s"][1] == pytest.approx(kinds["library"]["wall_s"][1] + kinds[flow]["added_s"][1])
    again = json.loads(run_benchmark(FLOW_OVERHEAD, *words, "--page", str(page), settings=settings).stdout)
    assert again == first
    assert "## Goals" in page.read_text("utf-8")


def test_tied_table_counts_as_read_and_a_table_of_rows_does_not() -> None:
    constants = {"table": 100.0, "scale": 4.0, "layer": 30.0, "layer scale": 2.0}
    operations = [
        Operation("Convert", ["table"], ["numbers"]),
        Operation("Multiply", ["numbers", "scale"], ["rows"]),
        Operation("Gather", ["rows", "ids"], ["hidden"]),
        Operation("Multiply", ["layer", "layer scale"], ["weights"]),
        Operation("MatMul", ["hidden", "weights"], ["output"]),
    ]
    assert bytes_per_token(constants, operations) == 30 + 2
    tied = [*operations, Operation("MatMul", ["output", "rows"], ["logits"])]
    assert bytes_per_token(constants, tied) == 100 + 4 + 30 + 2


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
    assert {*SCRIPTS, S3_THROUGHPUT, GENERATION, FLOW_OVERHEAD, REGISTRY, PEERS} == {
        path.stem for path in (ROOT / "benchmarks").glob("exp_*.py")
    }
