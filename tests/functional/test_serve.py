"""`make serve`: one process that starts everything, four ways to start a run, and an end that leaves nothing."""

from __future__ import annotations

import json
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
from tests.functional.browser import DESKTOP, PHONE, PROGRAM, Page, browser
from tests.functional.served import ROOT, RUN_S, Served, environment, eventually, free_port, serve
from tests.models import build_model
from tests.services.example_process import FOLDER

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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_model(tmp_path_factory.mktemp("models") / "model", HfTask.TEXT_CLASSIFICATION))


def test_form_schedule_api_and_event_each_lead_to_a_registered_version(
    served: Served, model: str, tmp_path: Path
) -> None:
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
    assert re.search(r"^Completed: pass: .*; by-api version 1, verdict pass$", example.stdout, re.MULTILINE)

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


@pytest.fixture(scope="module")
def page(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A browser that is logged in. Look at its pictures in outputs/screenshots."""
    if PROGRAM is None:
        pytest.skip("chromium is not installed")
    with browser(tmp_path_factory.mktemp("browser"), ROOT / "outputs" / "screenshots") as page:
        page.open(f"http://127.0.0.1:{served.port}/login")
        page.until("document.activeElement?.type === 'password'", "the page does not ask for the password")
        page.type(served.client_environment["PREFECT_API_AUTH_STRING"])
        page.click("Login")
        page.shows("Dashboard")
        yield page


@contextmanager
def following(served: Served, name: str, folder: Path) -> Iterator[Path]:
    """Run the example that pulls promoted versions, and give the link that it keeps."""
    words = [sys.executable, str(FOLDER / "pull_promoted.py"), name, str(folder)]
    variables = environment(served.home) | served.client_environment
    with subprocess.Popen(words, env=variables, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            expected = f"No version of {name} is in the stage 'production'. Versions by stage: none (1).\n"
            assert process.stdout.readline() == expected
            yield folder / "current"
        finally:
            process.terminate()


@pytest.mark.parametrize(("ui", "root"), [("v1", ""), ("v2", "/v2")])
def test_person_compiles_and_approves_in_the_browser_and_a_service_pulls(
    served: Served, page: Page, model: str, tmp_path: Path, ui: str, root: str
) -> None:
    address, name = f"http://127.0.0.1:{served.port}{root}", f"by-{ui}"

    page.open(f"{address}/deployments/deployment/{served.deployment_id()}/run")
    page.shows("Maximum sequence length")
    page.pictures(f"{ui}-form")
    page.fill("Model", model)
    for label, text in (("Registered name (Optional)", name), ("Maximum sequence length (Optional)", "16")):
        page.click_after(label, "Value")
        page.fill(label, text)
    page.click("Submit")
    run = served.run_of(f"{name} for onnx-runtime", "Completed")

    page.open(f"{address}/runs/flow-run/{run['id']}")
    page.shows("Completed")
    page.click("Artifacts")
    for kind in ("progress", "report", "figures", "artifact", "report-page", "version"):
        page.shows(f"{name}-onnx-runtime-{kind}")
    page.pictures(f"{ui}-run")
    of_run = {"flow_run_id": {"any_": [run["id"]]}, "type": {"any_": ["markdown"]}}
    filtered = {"artifacts": {**of_run, "key": {"any_": [f"{name}-onnx-runtime-report"]}}}
    (report,) = served.call("POST", "/artifacts/filter", filtered)[1]
    page.open(f"{address}/artifacts/artifact/{report['id']}")
    page.shows("changed answers: 0 of ")
    page.until("visible('img').some((image) => image.naturalWidth > 500)", "the report has no picture")
    page.pictures(f"{ui}-report")

    # The event of the new version has started the question.
    question = served.run_of(f"{name} version 1 to production", "Suspended")
    with following(served, name, tmp_path) as current:
        for size, device in ((PHONE, "phone"), (DESKTOP, "desktop")):
            page.resize(size)
            page.open(f"{address}/runs/flow-run/{question['id']}")
            page.shows("Suspended")
            if ui == "v2":
                page.click("Open menu")
            elif size == PHONE:
                page.click_first(".p-button--outline.h-10.w-10:not(.app-router-view__menu-icon)")
            page.click("Resume")
            page.shows(f"Promote {name} version 1 to production?")
            for text in ("pass: all ", "0 of the answers", "batch x tokens", "compileflow inspect"):
                page.shows(text)
            page.picture(f"{ui}-approval-{device}")
        page.choose("Decision", "approve")
        page.fill("Your name", "Ann")
        page.fill("Reason", "no answer changed")
        page.picture(f"{ui}-approval-filled")
        # On a busy machine the server may refuse, and both UIs then wait for the person to try again.
        for _ in range(5):
            page.click("Submit" if ui == "v1" else "Resume")
            time.sleep(5)
            if served.call("GET", f"/flow_runs/{question['id']}")[1]["state"]["name"] != "Suspended":
                break
        served.run_of(f"{name} version 1 to production", "Completed")
        registry = open_registry(Settings(home=served.home).resolved_registry_uri())
        assert registry.get(name, 1).stage == "production"
        history = [(entry.stage, entry.who, entry.reason) for entry in registry.promotions(name, 1)]
        assert history == [("production", "Ann", "no answer changed")]
        eventually(current.exists, "the service has not pulled the version")
        assert (current / "manifest.json").is_file()


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
