"""settle_pending and revalidate: flows that validate what was compiled before, and the events that they send."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

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
from tests.functional.prefect_server import PrefectServer
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


def test_artifact_that_waits_for_its_device_is_registered_by_the_flow_that_settles_it(
    pipeline: Pipeline, tiny_model: ModelFactory, vendor_doubles: Path, prefect_server: PrefectServer
) -> None:
    request = pipeline.request(tiny_model(HfTask.TEXT_CLASSIFICATION), target="neuron", name="reviews")
    (vendor_doubles / "neuron0").unlink()
    state = compile_model(request, return_state=True)
    assert state.is_failed()
    assert str(state.message).startswith("pending-device: neuron cannot run here")
    uri = pipeline.compile(request).uri
    payload_of(prefect_server, "artifact.pending-device", artifact_uri=uri, target="neuron")

    (vendor_doubles / "neuron0").touch()
    state = settle_pending(uri, return_state=True)
    assert state.is_completed(), state.message
    version = open_registry(pipeline.registry_uri).get("reviews", 1)
    assert (version.verdict, version.artifact_uri) == ("pass", uri)
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
