"""Faults of a real server and worker: killed, stopped, cancelled. `make serve` runs them, on Postgres.

One server has all faults, most of them while it waits for the heartbeats of two dead runs.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import asyncpg
import psutil
import pytest

from compileflow._process.folders import sweep
from compileflow.catalog import open_registry
from compileflow.settings import Settings
from compileflow.spec import HfTask
from tests.conftest import ModelFactory
from tests.functional.served import Served, eventually, free_port, serve

pytestmark = [pytest.mark.functional, pytest.mark.slow]
FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
OUTAGE_S = 30
# Postgres refuses to run as root. This user may still read the interpreter and the tests' models.
_NOBODY = 65534
_AS_NOBODY = (
    *("setpriv", f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups"),
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
)


def user_prefix() -> tuple[str, ...]:
    """Return the words that start a command as a user who may run Postgres; () for this user."""
    if os.geteuid() != 0:
        return ()
    tried = shutil.which("setpriv") and subprocess.run([*_AS_NOBODY, sys.executable, "-c", ""], check=False)
    return _AS_NOBODY if tried and tried.returncode == 0 else ()


def programs(processes: Iterable[psutil.Process]) -> str:
    """Return the command lines of those processes that have not ended meanwhile."""
    lines = []
    for process in processes:
        with suppress(psutil.Error):
            lines.append(" ".join(process.cmdline()))
    return "\n".join(lines)


@dataclass
class Faulty(Served):
    """A `make serve` whose parts a test stops and kills."""

    def part(self, name: str) -> psutil.Process:
        """Return the process of the server or of the worker."""
        (process,) = [
            child
            for child in psutil.Process(self.process.pid).children()
            if child.cmdline()[2:5] == ["prefect", name, "start"]
        ]
        return process

    def start_run(self, model: Path, name: str, **parameters: Any) -> str:
        request = {"model": str(model), "target": "torchscript", "max_sequence_length": 16, "name": name}
        body = {"parameters": {"request": request | parameters}, "enforce_parameter_schema": False}
        path = f"/deployments/{self.deployment_id()}/create_flow_run"
        status, run = self.call("POST", path, body)
        assert status == 201, run
        return str(run["id"])

    def run_again(self, run_id: str) -> None:
        """Do what the button Retry does."""
        body = {"state": {"type": "SCHEDULED", "name": "AwaitingRetry"}, "force": True}
        assert self.call("POST", f"/flow_runs/{run_id}/set_state", body)[0] == 201

    def state(self, run_id: str) -> dict[str, Any]:
        state: dict[str, Any] = self.call("GET", f"/flow_runs/{run_id}")[1]["state"]
        return state

    def final_state(self, run_id: str) -> dict[str, Any]:
        eventually(lambda: self.state(run_id)["type"] in FINAL, self.worker_log())
        return self.state(run_id)

    def worker_log(self) -> str:
        return (self.home / "serve" / "logs" / "worker.log").read_text("utf-8")

    def processes_of(self, run_id: str) -> list[psutil.Process]:
        """Return the process of a run, which leads them, and all that it started."""
        for process in psutil.process_iter():
            try:
                is_flow = process.environ().get("PREFECT__FLOW_RUN_ID") == run_id
                if is_flow and process.ppid() == self.part("worker").pid:
                    return [process, *process.children(recursive=True)]
            except (psutil.Error, ValueError):
                continue
        return []

    def compiling(self, run_id: str, program: str = "run_in_child") -> list[psutil.Process]:
        """Wait until a run has started a program, by default the process that compiles; return its processes."""

        def compile_processes() -> list[psutil.Process]:
            processes = self.processes_of(run_id)
            return processes if program in programs(processes) else []

        found: list[psutil.Process] = eventually(compile_processes, f"no {program} runs\n{self.worker_log()}")
        return found

    def versions(self, name: str) -> list[int]:
        registry = self.home / "registry.db"
        if not registry.exists():
            return []
        versions = open_registry(Settings(home=self.home).resolved_registry_uri()).versions()
        return [version.version for version in versions if version.name == name]

    def compiles(self, *run_ids: str) -> list[str]:
        """Return the states of all compile tasks of some runs, once all of them are recorded."""
        query = {"task_runs": {"flow_run_id": {"any_": list(run_ids)}, "name": {"like_": "compile"}}}

        def names() -> list[str]:
            states = [run["state"]["name"] for run in self.call("POST", "/task_runs/filter", query)[1]]
            return states if len(states) >= len(run_ids) and "Running" not in states else []

        recorded: list[str] = eventually(names, "the server does not record the tasks", 60)
        return sorted(recorded)


@pytest.fixture(scope="module")
def served() -> Iterator[Faulty]:
    # Not below pytest's folder, which another user cannot enter.
    with tempfile.TemporaryDirectory(prefix="compileflow-test-") as folder:
        home, port, prefix = Path(folder), free_port(), user_prefix()
        if prefix:
            os.chown(home, _NOBODY, _NOBODY)
        with serve(home, port, "auto", prefix=prefix, HOME=folder) as process:
            running = Faulty(home, port, process)
            try:
                running.wait_ready()
                # All faults at once, also where a run takes minutes to start.
                options = {"collision_strategy": "ENQUEUE", "grace_period_seconds": 600}
                body = {"concurrency_limit": 5, "concurrency_options": options}
                assert running.call("PATCH", f"/deployments/{running.deployment_id()}", body)[0] == 204
                yield running
            finally:
                process.send_signal(signal.SIGTERM)
                process.communicate(timeout=90)


@dataclass(frozen=True)
class DeadWorker:
    """Two runs of one worker, which was killed while both compiled; the process of one run was killed as well."""

    orphan_id: str
    killed_id: str
    orphan: list[psutil.Process]
    killed_at: float


@pytest.fixture(scope="module")
def model(tiny_model: ModelFactory) -> Path:
    return tiny_model(HfTask.TEXT_CLASSIFICATION)


@pytest.fixture(scope="module")
def dead_worker(served: Faulty, model: Path) -> DeadWorker:
    # `make serve` gives up if a worker ends in its first 15 seconds.
    time.sleep(max(0.0, 16 - (time.time() - served.part("worker").create_time())))
    orphan_id = served.start_run(model, "orphan")
    killed_id = served.start_run(model, "killed", max_sequence_length=24)
    orphan, killed = served.compiling(orphan_id), served.compiling(killed_id)
    served.part("worker").kill()
    killed[0].kill()
    killed_at = time.time()
    assert served.process.stdout is not None
    assert served.process.stdout.readline() == "The worker ended. Another one starts.\n"
    return DeadWorker(orphan_id, killed_id, orphan, killed_at)


def test_run_whose_worker_is_killed_crashes_at_once_and_leaves_no_process(
    served: Faulty, dead_worker: DeadWorker
) -> None:
    state = served.final_state(dead_worker.orphan_id)
    assert (state["type"], state["message"]) == ("CRASHED", "Execution was aborted by a termination signal.")
    assert psutil.wait_procs(dead_worker.orphan, timeout=10)[1] == []
    assert served.versions("orphan") == []


def test_two_triggers_of_one_request_lead_to_one_compile_and_one_version(
    served: Faulty, dead_worker: DeadWorker, model: Path
) -> None:
    run_ids = [served.start_run(model, "twice", max_sequence_length=20) for _ in range(2)]
    assert [served.final_state(run_id)["type"] for run_id in run_ids] == ["COMPLETED", "COMPLETED"]
    assert served.compiles(*run_ids) == ["Cached", "Completed"]
    assert served.versions("twice") == [1]


def test_cancelled_compile_ends_within_ten_seconds_and_leaves_nothing(
    served: Faulty, dead_worker: DeadWorker, model: Path
) -> None:
    manifests = set((served.home / "store" / "manifests").rglob("*"))
    run_id = served.start_run(model, "cancelled", target="aot-inductor")
    # The compile process starts g++, which starts the compiler.
    processes = served.compiling(run_id, "cc1plus")
    assert served.call("POST", f"/flow_runs/{run_id}/set_state", {"state": {"type": "CANCELLING"}})[0] == 201
    assert psutil.wait_procs(processes, timeout=10)[1] == []
    assert served.final_state(run_id)["type"] == "CANCELLED"
    assert served.versions("cancelled") == []
    assert set((served.home / "store" / "manifests").rglob("*")) == manifests
    # A run that takes 30 seconds to end is killed; the next one deletes what that leaves.
    sweep(served.home / "work")
    assert not list((served.home / "work").iterdir())


def test_parameters_of_another_version_of_the_flow_are_refused_in_one_line(
    served: Faulty, dead_worker: DeadWorker, model: Path
) -> None:
    state = served.final_state(served.start_run(model, "old", quantize=True, precision="half"))
    assert (state["type"], state["message"]) == (
        "FAILED",
        "Validation of flow parameters failed with error: SpecError: The parameters do not fit this version of "
        "the flow compile-model: request.precision: Input should be 'fp32', 'bf16', 'fp16', 'int8' or 'int4'; "
        "request.quantize: Extra inputs are not permitted. Correct them, or start a new run from the deployment.",
    )


def test_run_completes_although_the_server_is_down_for_half_a_minute(
    served: Faulty, dead_worker: DeadWorker, model: Path
) -> None:
    run_id = served.start_run(model, "outage", max_sequence_length=32)
    served.compiling(run_id)
    # The process that would start another server sleeps.
    served.process.send_signal(signal.SIGSTOP)
    server = served.part("server")
    for process in (*server.children(recursive=True), server):
        process.kill()
    time.sleep(OUTAGE_S)
    served.process.send_signal(signal.SIGCONT)
    assert served.process.stdout is not None
    assert served.process.stdout.readline() == "The server ended. Another one starts.\n"
    eventually(served.answers, "the server does not come back")
    assert served.final_state(run_id)["type"] == "COMPLETED"
    assert served.call("GET", f"/flow_runs/{run_id}")[1]["run_count"] == 1
    assert served.compiles(run_id) == ["Completed"]
    assert served.versions("outage") == [1]


def test_run_that_dies_with_its_worker_is_crashed_within_two_minutes(
    served: Faulty, dead_worker: DeadWorker
) -> None:
    state = served.final_state(dead_worker.killed_id)
    assert (state["type"], state["message"]) == (
        "CRASHED",
        "The run sent no heartbeat for 90 seconds. Its worker or its machine may have died.",
    )
    assert datetime.fromisoformat(state["timestamp"]).timestamp() - dead_worker.killed_at < 120


def test_another_worker_completes_the_runs_of_a_dead_one(served: Faulty, dead_worker: DeadWorker) -> None:
    run_ids = [dead_worker.orphan_id, dead_worker.killed_id]
    for run_id in run_ids:
        served.final_state(run_id)
        served.run_again(run_id)
    eventually(lambda: all(served.state(run_id)["type"] not in ("CRASHED",) for run_id in run_ids), "no rerun")
    assert [served.final_state(run_id)["type"] for run_id in run_ids] == ["COMPLETED", "COMPLETED"]
    assert [served.versions(name) for name in ("orphan", "killed")] == [[1], [1]]


def database_url(served: Served) -> str:
    """Return the URL of the database that `make serve` started; skip the test if it could not start one."""
    database = [child for child in psutil.Process(served.process.pid).children() if child.name() == "postgres"]
    if not database:
        pytest.skip("Postgres is not installed, or this user is root and cannot become another one")
    assert "on loopback only, with Postgres." in served.output
    words = database[0].cmdline()
    password = served.client_environment["PREFECT_API_AUTH_STRING"].partition(":")[2]
    return f"postgresql://prefect:{password}@127.0.0.1:{words[words.index('-p') + 1]}/postgres"


def execute(url: str, *statements: str) -> None:
    """Run statements in a Postgres database."""

    async def run() -> None:
        connection = await asyncpg.connect(url)
        for statement in statements:
            await connection.execute(statement)
        await connection.close()

    asyncio.run(run())


def test_strict_postgres_of_a_user_is_refused_in_one_line(served: Faulty, tmp_path: Path) -> None:
    url = database_url(served)
    execute(
        url,
        "CREATE ROLE strict LOGIN PASSWORD 'secret'",
        "ALTER ROLE strict SET default_transaction_isolation = 'repeatable read'",
    )
    host = url.partition("@")[2]
    own = {"PREFECT_API_DATABASE_CONNECTION_URL": f"postgresql+asyncpg://strict:secret@{host}"}
    with serve(tmp_path, free_port(), "auto", **own) as process:
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert output.splitlines()[1:] == [
        "error: The Prefect server needs default_transaction_isolation = 'read committed', but "
        f"postgresql+asyncpg://***@{host} has 'repeatable read'. Change it where it is set: in postgresql.conf, "
        "in the URL, or by ALTER DATABASE or ALTER ROLE."
    ]


def test_ctrl_c_ends_a_running_compile_as_crashed_and_ends_nothing_else(served: Faulty, model: Path) -> None:
    run_id = served.start_run(model, "interrupted", max_sequence_length=40)
    served.compiling(run_id)
    started = psutil.Process(served.process.pid).children(recursive=True)
    # A process of the same user with the same variables.
    with subprocess.Popen(["sleep", "300"], env=os.environ | {"COMPILEFLOW_HOME": str(served.home)}) as bystander:
        served.process.send_signal(signal.SIGINT)
        output, _ = served.process.communicate(timeout=90)
        assert output == "Stopping. A run that is under way ends as Crashed.\nStopped.\n"
        assert served.process.returncode == 0
        assert psutil.wait_procs(started, timeout=5)[1] == []
        assert bystander.poll() is None
        bystander.kill()
    assert served.processes() == []

    # A second start has the same password, and does not print it.
    before = served.client_environment
    with serve(served.home, served.port, "auto", prefix=user_prefix(), HOME=str(served.home)) as process:
        again = Faulty(served.home, served.port, process)
        try:
            again.wait_ready()
            assert again.client_environment == before
            assert before["PREFECT_API_AUTH_STRING"] not in again.output
            state = again.state(run_id)
            assert (state["type"], state["message"]) == (
                "CRASHED",
                "Execution was aborted by a termination signal.",
            )
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=90)
    assert again.processes() == []
