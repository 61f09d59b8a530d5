"""Times of the calls of each registry, by the number of its versions. JSON on standard output.

python benchmarks/exp_registry.py [--versions N ...] [--among NAME ...] [--page docs/reference/registry-timings.md]

The registries are a SQLite file, the Neptune-compatible server of this repository, and `mlflow server`. Both
servers run on loopback. The versions are written into the databases, because registering 10,000 takes hours. A
tenth of them has one name, and each other name has ten. The fastest of several calls counts: other work on the
machine only makes a call slower.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.compiled import print_rows
from compileflow.catalog import open_registry
from compileflow.contracts import ModelRegistry, VersionEntry
from compileflow.registries.mlflow.tags import entry_tags
from compileflow.registries.neptune import fields as neptune_fields
from compileflow.settings import get_settings
from compileflow.testing.registries import version_entry
from compileflow.validation.report import environment
from deployments.neptune_server import containers
from deployments.neptune_server import fields as server_fields
from deployments.neptune_server.database import Database
from tests.services.mlflow import serve_mlflow
from tests.services.neptune import WORKSPACE, serve_neptune

LARGE = "large"
# Goals: a call on one name or version, and a command.
CALL_MS, COMMAND_MS = 20.0, 1500.0
# Before the registries had indexes and pages: SQLite with 10,000 versions.
BEFORE = {
    "get NAME@N": 410.0,
    "all versions": 950.0,
    "set_stage": 660.0,
    "compileflow versions": 17_600.0,
    "compileflow versions NAME": 10_700.0,
}
START = datetime(2026, 1, 1, tzinfo=UTC)


def entries(count: int) -> Iterator[tuple[VersionEntry, int, datetime]]:
    """Yield the entries of a registry with `count` versions, each with its number and its time."""
    for position in range(count):
        is_large = position % 10 == 0
        name = LARGE if is_large else f"model-{position // 100}-{position % 10}"
        number = position // 10 + 1 if is_large else position % 100 // 10 + 1
        yield version_entry(name, position + 1), number, START + timedelta(minutes=position)


def fill_sqlite(path: Path, count: int) -> None:
    """Write versions into the file of a SQLite registry."""
    registry = open_registry(f"sqlite:///{path}")
    for entry, _, _ in entries(1):
        registry.register(entry)
    with closing(sqlite3.connect(path)) as db, db:
        for entry, number, moment in entries(count):
            db.execute("INSERT OR IGNORE INTO model(name) VALUES (?)", (entry.name,))
            db.execute(
                "INSERT OR IGNORE INTO version(model_id, number, artifact_digest, created_at, entry) "
                "SELECT id, ?, ?, ?, ? FROM model WHERE name = ?",
                (number, entry.artifact_digest, moment.isoformat(), entry.model_dump_json(), entry.name),
            )


def fill_neptune(folder: Path, qualified_name: str, count: int) -> None:
    """Write versions into a project of the Neptune-compatible server."""
    database = Database(folder / "registry.db")
    with database.writing() as db:
        project = containers.find_project(db, qualified_name)
        models: dict[str, str] = {}
        for entry, _, moment in entries(count):
            if entry.name not in models:
                model = containers.create_model(db, project, neptune_fields.model_key(entry.name))
                server_fields.put(db, model, neptune_fields.NAME, "string", entry.name)
                models[entry.name] = model.id
            version = containers.create_model_version(db, project, models[entry.name])
            values: dict[str, Any] = {
                neptune_fields.NAME: entry.name,
                neptune_fields.DIGEST: entry.artifact_digest,
                **neptune_fields.entry_fields(entry, None),
            }
            for path, value in values.items():
                server_fields.put(db, version, path, "string" if isinstance(value, str) else "float", value)
            server_fields.put(db, version, neptune_fields.COMPLETE, "bool", 1)
            server_fields.put(db, version, "sys/creation_time", "datetime", containers.iso_time(moment))
    database.close()


def fill_mlflow(database: Path, count: int) -> None:
    """Write versions into the database of an MLflow server that has one version of ours."""
    with closing(sqlite3.connect(database)) as db, db:
        for entry, number, moment in entries(count):
            moment_ms = int(moment.timestamp() * 1000)
            db.execute(
                "INSERT OR IGNORE INTO registered_models(name, creation_time, last_updated_time, workspace) "
                "VALUES (?, ?, ?, 'default')",
                (entry.name, moment_ms, moment_ms),
            )
            db.execute(
                "INSERT OR IGNORE INTO model_versions(name, version, creation_time, last_updated_time, "
                "current_stage, source, status, workspace) VALUES (?, ?, ?, ?, 'None', '', 'READY', 'default')",
                (entry.name, number, moment_ms, moment_ms),
            )
            db.executemany(
                "INSERT OR IGNORE INTO model_version_tags(key, value, name, version, workspace) "
                "VALUES (?, ?, ?, ?, 'default')",
                [(key, value, entry.name, number) for key, value in entry_tags(entry).items()],
            )


@contextmanager
def sqlite_registry(folder: Path, count: int) -> Iterator[str]:
    """Give the URI of a SQLite registry with `count` versions."""
    fill_sqlite(folder / "registry.db", count)
    yield f"sqlite:///{folder / 'registry.db'}"


@contextmanager
def neptune_registry(folder: Path, count: int) -> Iterator[str]:
    """Give the URI of a project with `count` versions on a Neptune-compatible server."""
    with serve_neptune(folder / "server") as server:
        os.environ.update(server.environment)
        get_settings.cache_clear()
        fill_neptune(server.folder, f"{WORKSPACE}/first", count)
        yield f"neptune://{WORKSPACE}/first"


@contextmanager
def mlflow_registry(folder: Path, count: int) -> Iterator[str]:
    """Give the URI of an MLflow server with `count` versions."""
    with serve_mlflow(folder / "mlflow.db") as server:
        fill_mlflow(server.database, count)
        yield f"mlflow:{server.url}"


REGISTRIES: dict[str, Callable[[Path, int], Any]] = {
    "sqlite": sqlite_registry,
    "neptune": neptune_registry,
    "mlflow": mlflow_registry,
}


def measure(uri: str, count: int, rounds: int) -> dict[str, float]:
    """Return the milliseconds of each call on a filled registry."""
    registry: ModelRegistry = open_registry(uri)
    number = max(1, count // 20)
    digest = registry.get(LARGE, number).artifact_digest
    registry.set_stage(LARGE, number, "production", who="benchmark")
    stages = iter(["staging", "production"] * rounds)
    calls: dict[str, Callable[[], object]] = {
        "get NAME@N": lambda: registry.get(LARGE, number),
        "get NAME@production": lambda: registry.get(LARGE, "production"),
        "find DIGEST": lambda: registry.find(digest),
        "promotions": lambda: registry.promotions(LARGE, number),
        "50 versions of NAME": lambda: registry.versions(LARGE, limit=50),
        "50 newest versions": lambda: registry.versions(limit=50),
        "set_stage": lambda: registry.set_stage(LARGE, number, next(stages), who="benchmark"),
    }
    figures = {name: min(timed(call) for _ in range(rounds)) for name, call in calls.items()}
    figures["all versions"] = timed(registry.versions)
    for name, words in {"compileflow versions": (), "compileflow versions NAME": (LARGE,)}.items():
        command = [sys.executable, "-m", "compileflow", "versions", *words, "--registry", uri]
        runs = [run_command(command) for _ in range(min(rounds, 3))]
        figures[name] = min(wall_ms for wall_ms, _ in runs)
        figures[f"{name}, processor time"] = min(processor_ms for _, processor_ms in runs)
    return figures


def run_command(command: Sequence[str]) -> tuple[float, float]:
    """Run a command; return its milliseconds, and those of the processor in its processes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    wall_ms = timed(lambda: subprocess.run(command, check=True, capture_output=True))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall_ms, 1000 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def timed(call: Callable[[], object]) -> float:
    """Return the milliseconds of a call."""
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def rows(results: dict[str, dict[str, dict[str, float]]], name: str) -> list[tuple[str, ...]]:
    """Return the table of one registry, header first."""
    sizes = results[name]
    before = ("before, at 10,000",) if name == "sqlite" else ()
    table = [("call", *(f"{int(size):,} versions" for size in sizes), *before)]
    for call in next(iter(sizes.values())):
        figures = [f"{figures[call]:,.1f} ms" for figures in sizes.values()]
        old = (f"{BEFORE[call]:,.0f} ms" if call in BEFORE else "",) if before else ()
        table.append((call, *figures, *old))
    return table


def page(results: dict[str, dict[str, dict[str, float]]], versions: str) -> str:
    """Return the page."""
    tables = "\n".join(f"## {name}\n\n" + "\n".join(_markdown(rows(results, name))) + "\n" for name in results)
    return f"""# Times of the registries

This page is generated by `benchmarks/exp_registry.py`.

{(__doc__ or "").split(chr(10) * 2)[2].strip()}

The goals, with 10,000 versions: {CALL_MS:.0f} ms for a call on one name or version, {COMMAND_MS / 1000} s for a
command. "Before" are the figures of a SQLite registry without indexes on names, stages and times, and without
pages.

Machine and versions: {versions}.

When the measurement ended, the load of its {os.cpu_count()} CPUs was about {os.getloadavg()[0]:.0f}, that of the
measurement included. On a busy machine, the times of servers and commands are upper bounds.

{tables}"""


def _markdown(table: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in table]
    return [lines[0], "|" + " --- |" * len(table[0]), *lines[1:]]


def main() -> int:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--versions", type=int, nargs="+", default=[10, 1_000, 10_000])
    parser.add_argument("--among", nargs="+", choices=list(REGISTRIES), default=list(REGISTRIES))
    parser.add_argument("--rounds", type=int, default=9, help="calls of each kind")
    parser.add_argument("--page", type=Path, help="page to write")
    options = parser.parse_args()
    results: dict[str, dict[str, dict[str, float]]] = {name: {} for name in options.among}
    for name in options.among:
        for count in options.versions:
            with tempfile.TemporaryDirectory() as folder, REGISTRIES[name](Path(folder), count) as uri:
                results[name][str(count)] = measure(uri, count, options.rounds)
        print(f"\n{name}", file=sys.stderr)
        print_rows(rows(results, name))
    machine = environment(1)
    if options.page:
        options.page.write_text(page(results, ", ".join(f"{key} {value}" for key, value in machine.items())))
    print(json.dumps({"environment": machine, "results": results}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
