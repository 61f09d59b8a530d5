"""settle_pending and revalidate: flows that validate what was compiled before, and the events that they send."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow_sync

from compileflow.catalog import open_registry
from compileflow.errors import LoadError, VerdictError
from compileflow.spec import HfTask
from compileflow.steps import validate as validate_step
from compileflow.validation.settings import ValidationSettings
from flows.compile_model import compile_model
from flows.revalidate import revalidate
from flows.settle_pending import settle_pending
from tests.conftest import ModelFactory
from tests.doubles.fixtures import vendor_doubles
from tests.functional.prefect_server import ROOT, PrefectServer
from tests.steps import Pipeline

__all__ = ["vendor_doubles"]
pytestmark = pytest.mark.slow


def payload_of(server: PrefectServer, event_name: str, **expected: Any) -> dict[str, Any]:
    """Wait for an event whose payload holds these values, and return the payload."""
    body = {"filter": {"event": {"name": [f"compileflow.{event_name}"]}}, "limit": 50}
    deadline = time.monotonic() + 30
    while True:
        for event in server.call("POST", "/events/filter", body)[1]["events"]:
            payload: dict[str, Any] = event["payload"]
            if expected.items() <= payload.items():
                return payload
        assert time.monotonic() < deadline, (event_name, expected)
        time.sleep(0.5)


def started_run(server: PrefectServer, deployment_id: str) -> UUID:
    """Wait for the run of a deployment that an event starts, and return its id."""
    body = {"flow_runs": {"deployment_id": {"any_": [deployment_id]}}}
    deadline = time.monotonic() + 60
    while not (runs := server.call("POST", "/flow_runs/filter", body)[1]):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    (run,) = runs
    return UUID(run["id"])


@pytest.fixture
def device_deployment(prefect_server: PrefectServer, tmp_path: Path) -> str:
    """Id of settle-pending, deployed as the documentation says: with a pool of its own and its trigger on."""
    content = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text("utf-8"))
    (entry,) = [entry for entry in content["deployments"] if entry["name"] == "settle-pending"]
    entry["work_pool"] = {"name": "devices"}
    entry["triggers"][0]["enabled"] = True
    prefect_file = tmp_path / "prefect.yaml"
    prefect_file.write_text(yaml.safe_dump(content | {"deployments": [entry]}), "utf-8")
    prefect_server.prefect("work-pool", "create", "devices", "--type", "process")
    prefect_server.prefect(
        "--no-prompt", "deploy", "--prefect-file", str(prefect_file), "--name", "settle-pending"
    )
    return str(prefect_server.call("GET", "/deployments/name/settle-pending/settle-pending")[1]["id"])


def test_event_of_an_artifact_that_waits_for_its_device_starts_the_run_that_registers_it(
    pipeline: Pipeline,
    tiny_model: ModelFactory,
    vendor_doubles: Path,
    prefect_server: PrefectServer,
    device_deployment: str,
) -> None:
    request = pipeline.request(tiny_model(HfTask.TEXT_CLASSIFICATION), target="neuron", name="reviews")
    (vendor_doubles / "neuron0").unlink()
    state = compile_model(request, return_state=True)
    assert state.is_failed()
    assert str(state.message).startswith("pending-device: neuron cannot run here")
    uri = pipeline.compile(request).uri
    payload_of(prefect_server, "artifact.pending-device", artifact_uri=uri, target="neuron")

    run_id = started_run(prefect_server, device_deployment)
    # This process takes the place of a worker with the device, because the toolchain is a double.
    (vendor_doubles / "neuron0").touch()
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(run_id)
    state = run_flow_sync(settle_pending, flow_run=run, parameters=run.parameters, return_type="state")
    assert state.is_completed(), state.message
    version = open_registry(pipeline.registry_uri).get("reviews", 1)
    assert (version.verdict, version.artifact_uri, version.flow_run_id) == ("pass", uri, str(run_id))
    payload_of(prefect_server, "model-version.validated", artifact_uri=uri, name="reviews", version=1)


def test_promoted_version_that_does_not_load_any_more_fails_the_run_and_sends_an_event(
    pipeline: Pipeline,
    tiny_model: ModelFactory,
    prefect_server: PrefectServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    validation = ValidationSettings(latency_pairs=5, max_examples=340)
    assert revalidate(validation=validation, return_state=True).message == "none promoted"
    version = pipeline.run(pipeline.request(tiny_model(HfTask.TEXT_CLASSIFICATION), name="reviews"))
    open_registry(pipeline.registry_uri).set_stage("reviews", 1, "production", who="ann")
    assert revalidate(validation=validation, return_state=True).message == "1 passes"

    def refuse(*_: object, **__: object) -> None:
        raise LoadError("torch 9.9 cannot load this artifact.")

    monkeypatch.setattr(validate_step, "run_in_child", refuse)
    state = revalidate(validation=validation, return_state=True)
    assert (state.is_failed(), state.message) == (True, "1 regressed")
    assert isinstance(state.result(raise_on_failure=False), VerdictError)
    payload = payload_of(prefect_server, "model-version.regressed", artifact_uri=version.artifact_uri)
    assert (payload["name"], payload["stage"], payload["version"]) == ("reviews", "production", 1)
    assert "torch 9.9" in payload["reason"]
