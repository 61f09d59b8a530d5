"""watch_registry: each missing version is compiled once, however many watchers run, and announced once."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import pytest

from compileflow.admin.watch import WatchRequest
from compileflow.catalog import open_registry
from compileflow.spec import HfTask
from compileflow.steps.request import CompileRequest
from flows.compile_model import compile_model
from flows.watch_registry import watch_registry
from tests.conftest import ModelFactory
from tests.functional.prefect_server import PrefectServer
from tests.steps import BUCKETS, Pipeline


def created_events(server: PrefectServer) -> list[dict[str, Any]]:
    body = {"filter": {"event": {"name": ["compileflow.model-version.created"]}}, "limit": 50}
    return [event["payload"] for event in server.call("POST", "/events/filter", body)[1]["events"]]


@pytest.mark.slow
def test_two_watchers_compile_each_source_version_once(
    pipeline: Pipeline, tiny_model: ModelFactory, prefect_server: PrefectServer
) -> None:
    for name, task in (("reviews", HfTask.TEXT_CLASSIFICATION), ("people", HfTask.TOKEN_CLASSIFICATION)):
        pipeline.run(pipeline.request(tiny_model(task), target="openvino", shape_buckets=(), name=name))
    fields = {"shape_buckets": list(BUCKETS), "validation": {"latency_pairs": 5}}
    watch = WatchRequest(targets=("torchscript",), shared=fields)
    before = dict(pipeline.counts)
    with ThreadPoolExecutor(2) as threads:
        watchers = [threads.submit(copy_context().run, watch_registry, watch, return_state=True) for _ in range(2)]
        states = [watcher.result() for watcher in watchers]
    assert all(state.is_completed() for state in states), states
    assert pipeline.counts == {step: count + 2 for step, count in before.items()}
    versions = open_registry(pipeline.registry_uri).versions()
    compiled = [version.name for version in reversed(versions) if version.target == "torchscript"]
    assert sorted(compiled) == ["people", "reviews"]
    assert watch_registry(watch, return_state=True).message == "nothing missing"
    uris = {version.source_uri for version in versions}
    # The server writes events down some time after it has taken them.
    deadline, announced = time.monotonic() + 60, list[dict[str, Any]]()
    while len(announced) < 2 and time.monotonic() < deadline:
        time.sleep(0.5)
        announced = [event for event in created_events(prefect_server) if event["source_uri"] in uris]
    assert sorted(event["name"] for event in announced) == ["people", "reviews"]

    # The run that the event starts does nothing, because a watcher has compiled the version.
    after = dict(pipeline.counts)
    request = CompileRequest.model_validate(announced[0]["request"])
    state = compile_model(request, announcement=announced[0]["announcement"], return_state=True)
    assert (state.name, pipeline.counts) == ("Skipped", after)
