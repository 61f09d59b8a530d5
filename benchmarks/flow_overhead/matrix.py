"""A matrix of small models on Postgres with several workers, one of which is killed on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.flow_overhead.server import postgres, prefect_server, processor_s
from compileflow.catalog import open_registry
from compileflow.settings import Settings
from compileflow.spec import HfTask
from compileflow.validation.measure.contention import disturbance, take_sample
from deployments.services import Service
from tests.models import build_model

ROOT = Path(__file__).parents[2]
TARGETS = ("torchscript", "onnx-runtime")
DEPLOYMENT = "compile-model/cells"
_POOL = "cells"
_SHAPES = [{"batch_size": 1, "sequence_length": 16}]


def measured_matrix(folder: Path, *, models: int, serial_models: int, workers: int) -> dict[str, Any]:
    """Run some cells one after the other, then a matrix on all workers, and kill one when half is registered.

    Args:
        folder: Empty folder for models, stores, servers and logs.
        models: Models of the matrix.
        serial_models: Models whose cells run one after the other, for comparison.
        workers: Workers, each of which runs one cell at a time.
    """
    paths = [
        build_model(folder / f"model-{number}", HfTask.TEXT_CLASSIFICATION, seed=number)
        for number in range(models + serial_models)
    ]
    with ExitStack() as stack:
        url = stack.enter_context(postgres(folder / "postgres"))
        client = stack.enter_context(prefect_server(folder / "server", database_url=url))
        # A cell on one thread: the cells share the processors.
        environment = client | {
            "COMPILEFLOW_HOME": str(folder / "home"),
            "COMPILEFLOW_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            # As workers have it: the automation waits for three heartbeats.
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        }
        _deploy(folder, environment)
        services = []
        for number in range(workers):
            words = [sys.executable, "-m", "prefect", "worker", "start", "--pool", _POOL, "--limit", "1"]
            words += ["--name", f"worker-{number}"]
            log_path = folder / f"worker-{number}.log"
            worker = Service("worker", words, environment=environment, log_path=log_path, runs_flows=True)
            stack.callback(worker.stop)
            services.append(worker)
        before = replace(take_sample(1), own_cpu_s=processor_s())
        serial_s, serial_cells = _serial(paths[models:], environment)
        result = _parallel(paths[:models], environment, services, Settings(home=folder / "home"))
        after = replace(take_sample(1), own_cpu_s=processor_s())
    cells = result.pop("cells")
    linear_s = serial_s / serial_cells * len(cells) / (os.cpu_count() or 1)
    return result | {
        # More processes than processors are part of the question.
        "busy": disturbance([before, after], os.cpu_count() or 1),
        "workers": workers,
        "processors": os.cpu_count(),
        "cells": len(cells),
        "passed": sum(cell["candidate"]["outcome"] == "pass" for cell in cells),
        "cell_s": serial_s / serial_cells,
        "share_of_linear": linear_s / result["wall_s"],
    }


def _serial(models: list[Path], environment: dict[str, str]) -> tuple[float, int]:
    start = time.perf_counter()
    with _matrix(models, environment, at_once=1) as process:
        cells = _cells(process)
    return time.perf_counter() - start, len(cells)


def _parallel(
    models: list[Path], environment: dict[str, str], workers: list[Service], settings: Settings
) -> dict[str, Any]:
    """Run the matrix, kill a worker and its run when half of the cells are registered, and return figures."""
    registry = open_registry(settings.resolved_registry_uri(), settings)
    names = {model.name for model in models}
    cells = len(models) * len(TARGETS)
    start = time.perf_counter()
    killed_s = None
    with _matrix(models, environment, at_once=len(workers)) as process:
        while process.poll() is None and killed_s is None:
            time.sleep(0.5)
            if sum(version.name in names for version in registry.versions()) >= cells // 2:
                _kill(workers[-1])
                killed_s = time.perf_counter() - start
        outcomes = _cells(process)
    versions = [(version.name, version.target) for version in registry.versions() if version.name in names]
    return {
        "wall_s": time.perf_counter() - start,
        "killed_s": killed_s,
        "cells": outcomes,
        "versions": len(versions),
        "registered_once": len(set(versions)),
    }


def _matrix(models: list[Path], environment: dict[str, str], *, at_once: int) -> subprocess.Popen[str]:
    words = ["flows", "matrix", "--json", "--no-progress", "--deployment", DEPLOYMENT, "--at-once", str(at_once)]
    words += [word for model in models for word in ("--model", str(model))]
    words += [word for target in TARGETS for word in ("--target", target)]
    words += ["--field", f"shape_buckets={json.dumps(_SHAPES)}"]
    return subprocess.Popen(
        [sys.executable, "-m", *words], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )


def _cells(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """Wait for a matrix and return its cells."""
    out, _ = process.communicate()
    if not out:
        raise SystemExit(f"The matrix failed with {process.returncode}.")
    cells: list[dict[str, Any]] = json.loads(out)["cells"]
    return cells


def _kill(worker: Service) -> None:
    """Kill a worker and the run that it has started, as when its machine dies."""
    process = psutil.Process(worker.pid)
    for victim in (*process.children(recursive=True), process):
        victim.kill()


def _deploy(folder: Path, environment: dict[str, str]) -> None:
    """Apply the deployment of the cells, and the automations of the repository."""
    prefect_file = folder / "prefect.yaml"
    deployment = {
        "name": DEPLOYMENT.partition("/")[2],
        "entrypoint": "flows/compile_model.py:compile_model",
        "tags": ["compileflow"],
        "enforce_parameter_schema": True,
        "work_pool": {"name": _POOL},
    }
    prefect_file.write_text(yaml.safe_dump({"name": "matrix", "deployments": [deployment]}), "utf-8")
    words = [sys.executable, "-m", "deployments.deploy", "--prefect-file", str(prefect_file)]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"The deployment cannot be applied:\n{done.stdout}{done.stderr}")
