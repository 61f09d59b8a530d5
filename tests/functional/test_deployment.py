"""A deployment on a real server, run by a real worker, triggered over the API."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from prefect.utilities.schema_tools import validate

from compileflow.catalog import open_registry
from compileflow.serving.pipeline import CompiledPipeline
from compileflow.settings import Settings
from compileflow.spec import HfTask
from compileflow.steps.request import CompileRequest
from deployments import serve
from tests.functional.prefect_server import PrefectServer
from tests.models import build_model

pytestmark = pytest.mark.functional
POOL = "compileflow"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def server(
    prefect_server: PrefectServer, home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PrefectServer]:
    environment = prefect_server.environment | {"COMPILEFLOW_HOME": str(home)}
    running = replace(prefect_server, environment=environment, logs=tmp_path_factory.mktemp("worker"))
    running.python("deployments.deploy")
    with running.worker(POOL):
        yield running


@pytest.fixture(scope="module")
def deployment(server: PrefectServer) -> dict[str, Any]:
    status, answer = server.call("GET", "/deployments/name/compile-model/compile-model")
    assert status == 200
    return answer


def test_run_that_no_worker_started_is_crashed(server: PrefectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    access = serve.Access(server.api_url.removesuffix("/api"), password="", is_new=False)
    run = {"name": "lost", "flow_id": access.call("GET", "/flows/name/settle-pending")["id"], "tags": [serve.TAG]}
    pending = {"state": {"type": "PENDING", "name": "Submitting"}}
    run_id = access.call("POST", "/flow_runs/", run | pending)["id"]
    serve.crash_lost_runs(access)
    assert access.call("GET", f"/flow_runs/{run_id}")["state"]["type"] == "PENDING"
    monkeypatch.setattr(serve, "_LONGEST_PENDING", timedelta(0))
    serve.crash_lost_runs(access)
    assert access.call("GET", f"/flow_runs/{run_id}")["state"]["type"] == "CRASHED"


@pytest.mark.parametrize(
    ("name", "schedules", "limit"),
    [
        ("compile-matrix/nightly", {("nightly", False)}, "CANCEL_NEW"),
        ("watch-registry/watch-registry", {("every-ten-minutes", True)}, "CANCEL_NEW"),
        ("revalidate/revalidate", {("weekly", True)}, "CANCEL_NEW"),
        ("promote-model/promote-model", set(), None),
        ("settle-pending/settle-pending", set(), None),
    ],
)
def test_every_flow_is_deployed_with_its_schedules(
    server: PrefectServer, name: str, schedules: set[tuple[str, bool]], limit: str | None
) -> None:
    status, answer = server.call("GET", f"/deployments/name/{name}")
    assert status == 200
    assert {(schedule["slug"], schedule["active"]) for schedule in answer["schedules"]} == schedules
    options = answer["concurrency_options"]
    assert (options["collision_strategy"] if options else None) == limit
    assert answer["enforce_parameter_schema"]


def finished(server: PrefectServer, run_id: str, timeout_s: float = 240) -> dict[str, Any]:
    deadline = time.monotonic() + timeout_s
    while True:
        run = server.call("GET", f"/flow_runs/{run_id}")[1]
        if run["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
            return run
        assert time.monotonic() < deadline, (server.logs / "worker.log").read_text()
        time.sleep(0.5)


def trigger(server: PrefectServer, deployment: dict[str, Any], **request: Any) -> tuple[int, Any]:
    path = f"/deployments/{deployment['id']}/create_flow_run"
    return server.call("POST", path, {"parameters": {"request": request}})


def task_names(server: PrefectServer, run_id: str) -> set[str]:
    """Names of the tasks that the server has recorded for a flow run."""
    task_runs = server.call("POST", "/task_runs/filter", {"task_runs": {"flow_run_id": {"any_": [run_id]}}})[1]
    return {task_run["name"].rpartition("-")[0] for task_run in task_runs}


def test_run_over_the_api_registers_a_version_that_loads(
    server: PrefectServer, deployment: dict[str, Any], home: Path, tmp_path: Path
) -> None:
    model = build_model(tmp_path / "reviews", HfTask.TEXT_CLASSIFICATION)
    status, run = trigger(
        server, deployment, model=str(model), target="torchscript", shape_buckets=[
            {"batch_size": 1, "sequence_length": 16}, {"batch_size": 1, "sequence_length": 64},
        ],
    )  # fmt: skip
    assert status == 201, run
    run_end = finished(server, run["id"])
    assert run_end["state"]["type"] == "COMPLETED", run_end["state"]

    registry = open_registry(Settings(home=home).resolved_registry_uri())
    version = registry.get("reviews", 1)
    assert version.flow_run_id == run["id"]
    assert version.verdict == "pass"
    answer = CompiledPipeline.from_pretrained(version.artifact_uri)("a good day")
    assert answer[0]["label"] in ("negative", "neutral", "positive")

    artifacts = server.call("POST", "/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run["id"]]}}})[1]
    by_name = {artifact["key"].removeprefix("reviews-torchscript-"): artifact for artifact in artifacts}
    # Prefect keeps a link as Markdown.
    assert {name: artifact["type"] for name, artifact in by_name.items()} == {
        "progress": "progress", "report": "markdown", "figures": "table", "artifact": "markdown",
        "report-page": "markdown", "version": "markdown",
    }  # fmt: skip
    assert by_name["progress"]["data"] == 100
    assert by_name["report"]["data"].startswith("# pass: all ")
    assert "![picture](data:image/png;base64,iVBOR" in by_name["report"]["data"]
    page = by_name["report-page"]["data"].rpartition("(file://")[2].removesuffix(")")
    assert "<html" in Path(page).read_text("utf-8")
    assert by_name["version"]["data"].startswith("[reviews version 1](sqlite:///")
    steps = {"fetch", "compile", "validate", "register"}
    # The server records task runs from events, up to seconds after the flow run has ended.
    deadline = time.monotonic() + 60
    while not steps <= (names := task_names(server, run["id"])):
        assert time.monotonic() < deadline, names
        time.sleep(0.5)


def test_failing_run_says_why_in_one_line(
    server: PrefectServer, deployment: dict[str, Any], tmp_path: Path
) -> None:
    status, run = trigger(server, deployment, model=str(tmp_path / "nothing"), target="torchscript")
    assert status == 201
    state = finished(server, run["id"])["state"]
    assert state["type"] == "FAILED"
    assert state["message"] == (
        f"{tmp_path / 'nothing'} is not a folder. Give a model folder, or a Hub id as hf://owner/name."
    )


BUCKETS = [{"batch_size": 1, "sequence_length": 16}]


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        # Kinds of values.
        ("target", {"target": "toaster"}),
        ("precision", {"precision": "fp12"}),
        ("hf_task", {"hf_task": "cooking"}),
        ("max_sequence_length", {"max_sequence_length": 0}),
        ("max_sequence_length", {"max_sequence_length": "long"}),
        (
            "request.shape_buckets[0].sequence_length",
            {"shape_buckets": [{"batch_size": 1, "sequence_length": "x"}]},
        ),
        ("batch_size", {"shape_buckets": [{"sequence_length": 16}]}),
        ("request.shape_buckets", {"shape_buckets": "1x16"}),
        ("request.components[0].name", {"components": [{"name": "Word!"}]}),
        ("request.name", {"name": "two words"}),
        ("request.model", {"model": ""}),
        ("request.model", {"model": None}),
        ("request.trust_remote_code", {"trust_remote_code": "yes"}),
        ("request.target_options", {"target_options": [1]}),
        ("request.registry_uris", {"registry_uris": "sqlite:///r.db"}),
        ("request.validation.max_examples", {"validation": {"max_examples": 0}}),
        ("request.calibration.max_examples", {"calibration": {"max_examples": 0}}),
        ("request.auto.objective.goal", {"auto": {"objective": {"goal": "beauty"}}}),
        ("request.timeouts.compile_s", {"timeouts": {"compile_s": 0}}),
        # Unknown fields.
        ("modle", {"modle": "m"}),
        ("fetsch", {"steps": {"fetsch": False}}),
        # Fields that contradict one another.
        ("request.precision", {"target": "torchscript", "precision": "int8"}),
        ("request.precision", {"precision": "fp16"}),
        ("request.hf_task", {"target": "blade", "hf_task": "automatic-speech-recognition"}),
        ("request.max_sequence_length", {"components": [{"name": "word"}], "max_sequence_length": 16}),
        ("request.shape_buckets", {"components": [{"name": "word"}], "shape_buckets": BUCKETS}),
        ("request.revision", {"model": "/srv/model", "revision": "main"}),
        ("request.target_options", {"target": "auto", "target_options": {"quantization": "static"}}),
        ("request.steps.validate", {"target": "auto", "steps": {"validate": False}}),
    ],
)
def test_bad_parameter_is_refused_by_the_api_with_its_name(
    server: PrefectServer, deployment: dict[str, Any], field: str, request_: dict[str, Any]
) -> None:
    status, answer = trigger(server, deployment, **{"model": "m"} | request_)
    assert status == 409
    assert field in answer["detail"]


@pytest.mark.parametrize(
    ("field", "parameters"),
    [
        ("request", {}),
        ("model", {"request": {"target": "torchscript"}}),
        ("reqest", {"request": {"model": "m"}, "reqest": {}}),
        ("max_lateness_s", {"request": {"model": "m"}, "max_lateness_s": 0}),
    ],
)
def test_bad_parameter_of_the_flow_is_refused_by_the_api_with_its_name(
    server: PrefectServer, deployment: dict[str, Any], field: str, parameters: dict[str, Any]
) -> None:
    path = f"/deployments/{deployment['id']}/create_flow_run"
    status, answer = server.call("POST", path, {"parameters": parameters})
    assert status == 409
    assert field in answer["detail"]


@pytest.mark.parametrize(
    "request_",
    [
        {"revision": "main"},
        {"target": "generic", "precision": "bf16", "hf_task": "ner"},
        {"components": [{"name": "word"}], "max_sequence_length": None, "shape_buckets": []},
        {"target": "auto", "precision": "int8", "hf_task": None},
        CompileRequest(model="m").model_dump(mode="json"),
    ],
    ids=["revision", "alias", "components", "auto", "all defaults"],
)
def test_good_parameters_suit_the_schema(deployment: dict[str, Any], request_: dict[str, Any]) -> None:
    """Prefect's own check, without a run."""
    validate({"request": {"model": "m"} | request_}, deployment["parameter_openapi_schema"], raise_on_error=True)


def test_form_begins_with_model_and_target(deployment: dict[str, Any]) -> None:
    fields = deployment["parameter_openapi_schema"]["definitions"]["CompileRequest"]["properties"]
    assert sorted(fields, key=lambda name: fields[name]["position"])[:3] == ["model", "target", "precision"]
    assert [choice["title"] for choice in fields["name"]["anyOf"]] == ["Value", "Empty"]


def test_form_explains_every_parameter(deployment: dict[str, Any]) -> None:
    schema = deployment["parameter_openapi_schema"]
    definitions = schema["definitions"]
    for name, field in definitions["CompileRequest"]["properties"].items():
        # An enum's title stands in its own definition.
        enum = definitions[field["$ref"].rpartition("/")[2]] if "$ref" in field else {}
        assert {"title", "description"} <= {*field, *enum}, name
    assert set(definitions["CompileRequest"]["properties"]["target"]["enum"]) >= {"onnx-runtime", "torchscript"}
    assert definitions["Precision"]["enum"] == ["fp32", "bf16", "fp16", "int8", "int4"]
