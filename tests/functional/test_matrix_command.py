"""python -m flows matrix on a real server: the cells run on the worker of a deployment."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compileflow.catalog import open_registry
from compileflow.settings import Settings
from compileflow.spec import HfTask
from tests.functional.prefect_server import ROOT, PrefectServer
from tests.models import build_model

pytestmark = [pytest.mark.functional, pytest.mark.slow]
POOL = "matrix"


@pytest.fixture
def server(prefect_server: PrefectServer, tmp_path: Path) -> Iterator[PrefectServer]:
    environment = prefect_server.environment | {"COMPILEFLOW_HOME": str(tmp_path / "home")}
    running = replace(prefect_server, environment=environment, logs=tmp_path)
    running.prefect("work-pool", "create", POOL, "--type", "process", "--overwrite")
    entrypoint = "flows/compile_model.py:compile_model"
    running.prefect("--no-prompt", "deploy", entrypoint, "--name", "cells", "--pool", POOL)
    with running.worker(POOL):
        yield running


def run_matrix(server: PrefectServer, *words: str) -> tuple[int, dict[str, Any], str]:
    command = (sys.executable, "-m", "flows", "matrix", "--json", "--deployment", "compile-model/cells", *words)
    done = subprocess.run(command, cwd=ROOT, env=server.environment, capture_output=True, text=True, timeout=240)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout), done.stderr


def test_cells_run_on_the_worker_and_only_missing_ones_compile_again(
    server: PrefectServer, tmp_path: Path
) -> None:
    build_model(tmp_path / "reviews", HfTask.TEXT_CLASSIFICATION)
    words = ("--model", str(tmp_path / "reviews"), "--model", str(tmp_path / "people"), "--target", "torchscript",
             "--at-once", "2", "--field", 'shape_buckets=[{"batch_size": 1, "sequence_length": 64}]')  # fmt: skip
    status, matrix, errors = run_matrix(server, *words)
    outcomes = [cell["candidate"]["outcome"] for cell in matrix["cells"]]
    assert (status, outcomes) == (1, ["pass", "error"]), errors
    assert f"{tmp_path / 'people'} is not a folder" in errors
    registry = open_registry(Settings(home=tmp_path / "home").resolved_registry_uri())
    first = registry.get("reviews", 1)
    deployment = server.call("GET", "/deployments/name/compile-model/cells")[1]
    assert server.call("GET", f"/flow_runs/{first.flow_run_id}")[1]["deployment_id"] == deployment["id"]

    build_model(tmp_path / "people", HfTask.TOKEN_CLASSIFICATION)
    status, matrix, errors = run_matrix(server, *words)
    candidates = [cell["candidate"] for cell in matrix["cells"]]
    assert (status, [candidate["outcome"] for candidate in candidates]) == (0, ["pass", "pass"]), errors
    assert [candidate["cached"] for candidate in candidates] == [True, False]
    assert {version.name for version in registry.versions()} == {"reviews", "people"}
    assert registry.get("reviews", 1) == first
