"""`make serve`: one process that starts everything, four ways to start a run, and an end that leaves nothing."""

from __future__ import annotations

import json
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import psutil
import pytest
import yaml

from compileflow.catalog import open_registry
from compileflow.errors import RegistryError
from compileflow.settings import Settings
from compileflow.spec import HfTask
from tests.functional.served import ROOT, RUN_S, Served, environment, eventually, free_port, serve
from tests.models import build_model

pytestmark = [pytest.mark.functional, pytest.mark.slow]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    home, port = tmp_path_factory.mktemp("home"), free_port()
    with serve(home, port) as process:
        running = Served(home, port, process)
        try:
            running.wait_ready()
            yield running
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=90)


def test_password_is_printed_once_and_guards_the_server(served: Served) -> None:
    (password,) = re.findall(r"admin:(\S+)", served.output)
    assert served.client_environment["PREFECT_API_AUTH_STRING"] == f"admin:{password}"
    file_mode = (served.home / "serve" / "client.env").stat().st_mode
    assert stat.S_IMODE(file_mode) == 0o600
    assert served.call("POST", "/flows/filter", {}, login=False)[0] == 401
    assert served.call("POST", "/flows/filter", {})[0] == 200
    listening = [
        entry.laddr.ip
        for entry in psutil.net_connections("inet")
        if entry.laddr and entry.laddr.port == served.port
    ]
    assert set(listening) == {"127.0.0.1"}


def test_second_start_is_refused_in_one_line(served: Served, tmp_path: Path) -> None:
    for home, port, words in (
        (served.home, free_port(), f"Another process serves {served.home / 'serve'} already."),
        (tmp_path, served.port, f"Port {served.port} of 127.0.0.1 cannot be used: Address already in use."),
    ):
        with serve(home, port) as process:
            output, _ = process.communicate(timeout=60)
        assert process.returncode == 2
        assert output.startswith(f"error: {words}")
        assert output.count("\n") == 1


def test_form_schedule_api_and_event_each_lead_to_a_registered_version(served: Served, tmp_path: Path) -> None:
    model = str(build_model(tmp_path / "model", HfTask.TEXT_CLASSIFICATION))
    common = {"model": model, "max_sequence_length": 16}

    # As both UIs send the form.
    body = {
        "state": {"type": "SCHEDULED", "message": "Run from the Prefect UI with defaults"},
        "parameters": {"request": {**common, "name": "by-form"}},
        "enforce_parameter_schema": True,
    }
    status, answer = served.call("POST", f"/deployments/{served.deployment_id()}/create_flow_run", body)
    assert status == 201, answer

    entries = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text("utf-8"))
    schedule = {"cron": "* * * * *", "slug": "minutely"}
    schedule["parameters"] = {"request": {**common, "name": "by-schedule"}, "max_lateness_s": 3600}
    entries["deployments"][0]["schedules"] = [schedule]
    prefect_file = tmp_path / "prefect.yaml"
    prefect_file.write_text(yaml.safe_dump(entries), "utf-8")
    served.deploy(prefect_file)

    event = {
        "id": str(uuid4()),
        "occurred": datetime.now(UTC).isoformat(),
        "event": "compileflow.model-version.created",
        "resource": {"prefect.resource.id": "compileflow.model-version.reviews.3"},
        "payload": {"request": {**common, "name": "by-event"}},
    }
    assert served.call("POST", "/events", [event])[0] == 204

    example = subprocess.run(
        [sys.executable, "examples/start_run.py", model, "--name", "by-api", "--max-sequence-length", "16"],
        cwd=ROOT,
        env=environment(served.home) | served.client_environment,
        capture_output=True,
        text=True,
        timeout=RUN_S,
    )
    assert example.returncode == 0, example.stdout + example.stderr

    registry = open_registry(Settings(home=served.home).resolved_registry_uri())

    def verdict(name: str) -> str:
        try:
            return registry.get(name, 1).verdict
        except RegistryError:
            return ""

    for name in ("by-form", "by-schedule", "by-api", "by-event"):
        assert eventually(lambda name=name: verdict(name), f"{name} is not registered") == "pass"

    # A schedule that has left the file leaves the server, with the runs that it has planned.
    output = served.deploy(ROOT / "deployments" / "prefect.yaml")
    assert "removed the schedule minutely of compile-model" in output
    deployment_id = served.deployment_id()
    assert served.call("GET", f"/deployments/{deployment_id}/schedules")[1] == []
    planned = {
        "flow_runs": {"deployment_id": {"any_": [deployment_id]}, "state": {"type": {"any_": ["SCHEDULED"]}}}
    }
    assert [run for run in served.call("POST", "/flow_runs/filter", planned)[1] if run["auto_scheduled"]] == []


def test_curl_example_starts_a_run(served: Served, tmp_path: Path) -> None:
    done = subprocess.run(
        ["sh", "examples/start_run.sh", str(tmp_path / "nothing"), "by-curl"],
        cwd=ROOT,
        env=environment(served.home) | served.client_environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["parameters"]["request"]["name"] == "by-curl"
