"""Scheduled runs: an outage leads to one run, and a worker that dies does not block a deployment."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import psutil
import pytest
import yaml

from tests.functional.prefect_server import ROOT, PrefectServer

pytestmark = [pytest.mark.functional, pytest.mark.slow]
POOL = "schedules"
FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
# A run that works ends so: the model does not exist.
WORKED = "FAILED"


@pytest.fixture(scope="module")
def server(prefect_server: PrefectServer, tmp_path_factory: pytest.TempPathFactory) -> PrefectServer:
    folder = tmp_path_factory.mktemp("schedules")
    environment = prefect_server.environment | {"COMPILEFLOW_HOME": str(folder / "home")}
    running = replace(prefect_server, environment=environment, logs=folder)
    deployment = {
        "name": "scheduled",
        "entrypoint": "flows/compile_model.py:compile_model",
        "tags": ["compileflow"],
        "enforce_parameter_schema": True,
        "parameters": {"request": {"model": str(folder / "nothing")}, "max_lateness_s": 90},
        "concurrency_limit": {"limit": 1, "collision_strategy": "CANCEL_NEW", "grace_period_seconds": 3600},
        "work_pool": {"name": POOL},
    }
    (folder / "prefect.yaml").write_text(yaml.safe_dump({"deployments": [deployment]}), "utf-8")
    running.python("deployments.deploy", "--prefect-file", str(folder / "prefect.yaml"))
    return running


@contextmanager
def impatient_automation(server: PrefectServer) -> Iterator[str]:
    """The automation of deployments/automations.yaml that ends pending runs, with 10 seconds in place of 120."""
    entries = yaml.safe_load((ROOT / "deployments" / "automations.yaml").read_text("utf-8"))["automations"]
    (entry,) = [entry for entry in entries if "never started" in entry["name"]]
    entry["trigger"]["within"] = 10
    status, automation = server.call("POST", "/automations/", entry | {"name": "impatient"})
    assert status == 201, automation
    try:
        yield entry["actions"][0]["message"]
    finally:
        server.call("DELETE", f"/automations/{automation['id']}")


def start(server: PrefectServer, *, late_s: float = 0) -> str:
    """Create a run that was due some seconds ago, as the scheduler does, and return its id."""
    deployment = server.call("GET", "/deployments/name/compile-model/scheduled")[1]
    due = (datetime.now(UTC) - timedelta(seconds=late_s)).isoformat()
    state = {"type": "SCHEDULED", "state_details": {"scheduled_time": due}}
    status, run = server.call("POST", f"/deployments/{deployment['id']}/create_flow_run", {"state": state})
    assert status == 201, run
    return str(run["id"])


def state_of(server: PrefectServer, run_id: str) -> dict[str, Any]:
    state: dict[str, Any] = server.call("GET", f"/flow_runs/{run_id}")[1]["state"]
    return state


def until(condition: Callable[[], Any], what: str, timeout_s: float = 240) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.1)
    return value


def final_state(server: PrefectServer, run_id: str) -> dict[str, Any]:
    until(lambda: state_of(server, run_id)["type"] in FINAL, (server.logs / "worker.log").read_text())
    return state_of(server, run_id)


def test_outage_of_a_minute_schedule_leads_to_one_run(server: PrefectServer) -> None:
    backlog = [start(server, late_s=120 + 60 * minute) for minute in range(30)]
    with server.worker(POOL):
        states = [final_state(server, run_id) for run_id in backlog]
        next_state = final_state(server, start(server))
    skipped = [state for state in states if state["name"] == "Skipped"]
    assert skipped
    assert all(state["type"] == "COMPLETED" and "Skipped: late." in state["message"] for state in skipped)
    # The others came while that one held the only slot.
    assert {state["type"] for state in states} <= {"COMPLETED", "CANCELLED"}
    assert next_state["type"] == WORKED


def test_worker_that_dies_with_a_pending_run_does_not_block_the_next_one(server: PrefectServer) -> None:
    run_id = start(server)
    with server.worker(POOL) as worker, impatient_automation(server) as message:
        until(lambda: state_of(server, run_id)["type"] == "PENDING", "no worker took the run")
        process = psutil.Process(worker.pid)
        for victim in (*process.children(recursive=True), process):
            victim.kill()
        worker.wait()
        # The slot is taken: a new run would be cancelled.
        state = until(
            lambda: (state := state_of(server, run_id))["type"] == "CRASHED" and state, "the run stays pending"
        )
        assert state["message"] == message
    with server.worker(POOL):
        assert final_state(server, start(server))["type"] == WORKED
