"""Approval on a real server: approve after a restart of server and worker, reject, and expiry."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from compileflow.catalog import open_registry
from compileflow.contracts import ModelRegistry
from compileflow.settings import Settings
from tests.functional.prefect_server import PrefectServer, _server_on, _start
from tests.unit.attested_artifacts import stored_entry

pytestmark = [pytest.mark.functional, pytest.mark.slow]
POOL = "promotion"


class OwnServer:
    """A Prefect server of this file's own, which a test may restart, with a worker."""

    def __init__(self, folder: Path, home: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.settings = Settings(home=home)
        server = _server_on(self._port, folder)
        environment = server.environment | {"COMPILEFLOW_HOME": str(home)}
        self.server: PrefectServer = replace(server, environment=environment)
        self._pid = 0
        self._worker = ExitStack()

    def start(self) -> None:
        self._pid = _start(self.server, self._port)

    def start_worker(self) -> None:
        self._worker.enter_context(self.server.worker(POOL))

    def stop(self) -> None:
        self._worker.close()
        os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, home: Path) -> Iterator[OwnServer]:
    running = OwnServer(tmp_path_factory.mktemp("server"), home)
    running.start()
    try:
        running.server.prefect("work-pool", "create", POOL, "--type", "process")
        entrypoint = "flows/promote_model.py:promote_model"
        running.server.prefect("--no-prompt", "deploy", entrypoint, "--name", "promote-model", "--pool", POOL)
        running.start_worker()
        yield running
    finally:
        running.stop()


@pytest.fixture
def registry(home: Path) -> ModelRegistry:
    return open_registry(Settings(home=home).resolved_registry_uri())


def ask(own: OwnServer, registry: ModelRegistry, **parameters: Any) -> tuple[str, str]:
    """Register a version, start the flow for it, and return the model's name and the id of the run."""
    name = f"ner-{uuid4().hex[:8]}"
    registry.register(stored_entry(own.settings, name))
    deployment = own.server.call("GET", "/deployments/name/promote-model/promote-model")[1]
    body = {"parameters": {"name": name, "version": 1, **parameters}}
    status, run = own.server.call("POST", f"/deployments/{deployment['id']}/create_flow_run", body)
    assert status == 201, run
    return name, run["id"]


def wait_for(own: OwnServer, run_id: str, *names: str) -> dict[str, Any]:
    deadline = time.monotonic() + 150
    while True:
        state: dict[str, Any] = own.server.call("GET", f"/flow_runs/{run_id}")[1]["state"]
        if state["name"] in names:
            return state
        log = own.server.logs / "worker.log"
        assert state["type"] not in ("FAILED", "CRASHED"), (state, log.read_text())
        assert time.monotonic() < deadline, (state, log.read_text())
        time.sleep(0.5)


def form_of(own: OwnServer, run_id: str) -> str:
    """Return the text of the form, which Prefect saves after the state."""
    details = own.server.call("GET", f"/flow_runs/{run_id}")[1]["state"]["state_details"]
    deadline = time.monotonic() + 30
    while True:
        status, text = own.server.call(
            "GET", f"/flow_runs/{run_id}/input/{details['run_input_keyset']['description']}"
        )
        if status == 200:
            return str(text)
        assert time.monotonic() < deadline
        time.sleep(0.5)


def answer(own: OwnServer, run_id: str, **fields: str) -> Any:
    return own.server.call("POST", f"/flow_runs/{run_id}/resume", {"run_input": fields})


def history(registry: ModelRegistry, name: str) -> list[tuple[str, str, str]]:
    return [(entry.stage, entry.who, entry.reason) for entry in registry.promotions(name, 1)]


def test_answer_after_a_restart_of_server_and_worker_promotes(own: OwnServer, registry: ModelRegistry) -> None:
    name, run_id = ask(own, registry)
    wait_for(own, run_id, "Suspended")
    assert f"Promote {name} version 1 to production?" in form_of(own, run_id)
    own.stop()
    own.start()
    own.start_worker()
    # Without a name and a reason the form is refused, and the run waits on.
    assert answer(own, run_id, decision="approve", who="", reason="")[1]["status"] == "REJECT"
    assert answer(own, run_id, decision="approve", who="Ann", reason="fast enough")[1]["status"] == "ACCEPT"
    wait_for(own, run_id, "Completed")
    assert history(registry, name) == [("production", "Ann", "fast enough")]
    filtered = {"filter": {"event": {"name": ["compileflow.model-version.promoted"]}}, "limit": 50}
    deadline = time.monotonic() + 30
    while not (events := own.server.call("POST", "/events/filter", filtered)[1]["events"]):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert [(event["payload"]["name"], event["payload"]["who"]) for event in events] == [(name, "Ann")]
    runs = own.server.call(
        "POST", "/flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}
    )
    assert runs[1] == []


def test_answer_counts_only_for_the_artifact_that_the_form_showed(own: OwnServer, registry: ModelRegistry) -> None:
    name, run_id = ask(own, registry)
    wait_for(own, run_id, "Suspended")
    form_of(own, run_id)
    other = stored_entry(own.settings, name, number=2)
    fields = {"artifact_digest": other.artifact_digest, "artifact_uri": other.artifact_uri}
    with closing(sqlite3.connect(own.settings.home_dir / "registry.db")) as database, database:
        ((model,),) = database.execute("SELECT id FROM model WHERE name = ?", [name])
        ((entry,),) = database.execute("SELECT entry FROM version WHERE model_id = ?", [model])
        values = [other.artifact_digest, json.dumps(json.loads(entry) | fields), model]
        database.execute("UPDATE version SET artifact_digest = ?, entry = ? WHERE model_id = ?", values)
    assert answer(own, run_id, decision="approve", who="Ann", reason="fast enough")[1]["status"] == "ACCEPT"
    deadline = time.monotonic() + 150
    while other.artifact_digest not in str(own.server.call("GET", f"/flow_runs/{run_id}")[1]["state"]):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert other.artifact_digest[:12] in form_of(own, run_id)
    assert history(registry, name) == []
    answer(own, run_id, decision="reject", who="Ann", reason="not that one")
    wait_for(own, run_id, "Rejected")


def test_rejection_leaves_who_and_why(own: OwnServer, registry: ModelRegistry) -> None:
    name, run_id = ask(own, registry, stage="staging")
    wait_for(own, run_id, "Suspended")
    form_of(own, run_id)
    answer(own, run_id, decision="reject", who="Bob", reason="two answers changed")
    wait_for(own, run_id, "Rejected")
    assert history(registry, name) == [("none", "Bob", "rejected for staging: two answers changed")]


def test_question_without_an_answer_expires(own: OwnServer, registry: ModelRegistry) -> None:
    name, run_id = ask(own, registry, wait_hours=0.002)
    assert wait_for(own, run_id, "Expired")["type"] == "CANCELLED"
    deadline = time.monotonic() + 30
    while not (entries := history(registry, name)):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert entries == [("none", "promote-model", "approval for production expired without an answer")]
