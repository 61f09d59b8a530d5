"""What Prefect adds to a run of the library, and a matrix on three workers. JSON on standard output.

python benchmarks/exp_flow_overhead.py [--part cached] [--part cold] [--part matrix] [--results FILE] [--page FILE]

The parts cached and cold time the same command without Prefect, against a running server and with the embedded
one, which take turns. The part matrix compiles 24 cells on Postgres with three workers, one of which is killed. A
part that the results file has is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.compiled import print_rows
from benchmarks.flow_overhead.matrix import measured_matrix
from benchmarks.flow_overhead.page import goal_rows, matrix_rows, run_rows, write_page
from benchmarks.flow_overhead.server import prefect_server, processor_s
from compileflow.contracts.toolkit import installed_versions
from compileflow.settings import get_settings
from compileflow.spec import HfTask
from compileflow.validation.measure.contention import Sample, disturbance, take_sample
from compileflow.validation.report import environment
from tests.models import build_model

ROOT = Path(__file__).parents[1]
LIBRARY, RUNNING, EMBEDDED = "library", "running server", "embedded server"
MODULES = {LIBRARY: "compileflow", RUNNING: "flows", EMBEDDED: "flows"}


def measured_runs(folder: Path, rounds: int, *, cold: bool) -> dict[str, Any]:
    """Time the command of each kind in turn.

    Args:
        folder: Empty folder for models, stores and servers.
        rounds: Number of runs of each kind.
        cold: Whether each run starts with an empty store; else all find everything in the cache.
    """
    model = build_model(folder / "model", HfTask.TEXT_CLASSIFICATION)
    with prefect_server(folder / "server") as client:
        environments = {kind: {**os.environ, "HF_HUB_OFFLINE": "1"} for kind in MODULES}
        environments[RUNNING] |= client
        environments[EMBEDDED]["PREFECT_HOME"] = str(folder / "embedded")
        homes = {kind: folder / kind.replace(" ", "-") for kind in MODULES}
        # The first runs fill the caches and make the database of the embedded server.
        first_s = {kind: _run(kind, model, homes[kind], environments[kind])["wall_s"] for kind in MODULES}
        runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in MODULES}
        before = sample()
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
            kinds = list(MODULES)
            for kind in (*kinds[number % 3 :], *kinds[: number % 3]):
                home = folder / f"{number}-{kind.replace(' ', '-')}" if cold else homes[kind]
                runs[kind].append(_run(kind, model, home, environments[kind]))
        help_s = [_seconds(["flows", "--help"], environments[LIBRARY])["wall_s"] for _ in range(rounds)]
        after = sample()
    figures = {
        kind: {name: quartiles([run[name] for run in runs[kind]]) for name in ("wall_s", "processor_s")}
        for kind in MODULES
    }
    for kind in (RUNNING, EMBEDDED):
        pairs = [
            flow["wall_s"] - library["wall_s"] for flow, library in zip(runs[kind], runs[LIBRARY], strict=True)
        ]
        figures[kind]["added_s"] = quartiles(pairs)
        figures[kind]["ratio"] = quartiles(
            [flow["wall_s"] / library["wall_s"] for flow, library in zip(runs[kind], runs[LIBRARY], strict=True)]
        )
    return {
        "busy": disturbance([before, after], get_settings().threads),
        "rounds": rounds,
        "first_s": first_s,
        "help_s": quartiles(help_s),
        "kinds": figures,
    }


def _run(kind: str, model: Path, home: Path, variables: dict[str, str]) -> dict[str, float]:
    words = [MODULES[kind], "compile", str(model), "--target", "torchscript", "--bucket", "1x16", "--no-progress"]
    return _seconds(words, variables | {"COMPILEFLOW_HOME": str(home)})


def _seconds(words: list[str], variables: dict[str, str]) -> dict[str, float]:
    """Run a module as a command; return its wall time and the processor time of all that it started."""
    start, before = time.perf_counter(), os.times()
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, env=variables, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr}")
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return {"wall_s": time.perf_counter() - start, "processor_s": used}


def sample() -> Sample:
    """Read the machine's counters; the processor time of the commands counts as that of this process."""
    return replace(take_sample(get_settings().threads), own_cpu_s=processor_s())


def quartiles(values: list[float]) -> list[float]:
    """Return the lower quartile, the median and the upper quartile."""
    return [float(value) for value in np.quantile(values, (0.25, 0.5, 0.75))]


def main() -> None:
    """Measure the parts that are missing, and print all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=("cached", "cold", "matrix"), help="default: all")
    parser.add_argument("--rounds", type=int, default=7, help="runs of each kind from the cache")
    parser.add_argument("--cold-rounds", type=int, default=3, help="runs of each kind with an empty store")
    parser.add_argument("--models", type=int, default=12, help="models of the matrix; each has two cells")
    parser.add_argument("--serial-models", type=int, default=2, help="models whose cells run one after the other")
    parser.add_argument("--workers", type=int, default=3, help="workers of the matrix; one is killed")
    parser.add_argument("--results", type=Path, help="JSON file that keeps the parts")
    parser.add_argument("--page", type=Path, help="write the page of the documentation")
    arguments = parser.parse_args()
    parts: dict[str, Callable[[Path], dict[str, Any]]] = {
        "cached": lambda folder: measured_runs(folder, arguments.rounds, cold=False),
        "cold": lambda folder: measured_runs(folder, arguments.cold_rounds, cold=True),
        "matrix": lambda folder: measured_matrix(
            folder,
            models=arguments.models,
            serial_models=arguments.serial_models,
            workers=arguments.workers,
        ),
    }
    kept = arguments.results is not None and arguments.results.is_file()
    answer: dict[str, Any] = json.loads(arguments.results.read_text("utf-8")) if kept else {}
    versions = installed_versions(("prefect", "fastapi", "sqlalchemy"))
    answer["environment"] = environment(get_settings().threads) | versions
    results = answer.setdefault("results", {})
    for part in arguments.part or parts:
        if part in results:
            continue
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            results[part] = parts[part](Path(folder))
        if arguments.results:
            arguments.results.write_text(json.dumps(answer, indent=1), "utf-8")
    for part, figures in results.items():
        print(f"{part}: {figures['busy'] and 'on a busy machine: ' + figures['busy']}", file=sys.stderr)
        print_rows(matrix_rows(figures) if part == "matrix" else run_rows(figures))
    print_rows(goal_rows(results))
    if arguments.page:
        write_page(answer, arguments.page)
    print(json.dumps(answer, indent=1))


if __name__ == "__main__":
    main()
