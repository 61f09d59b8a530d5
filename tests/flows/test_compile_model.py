"""The flow: the messages of its states, the versions that it registers, and its refusals."""

from __future__ import annotations

import time
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import State

from compileflow.catalog import open_registry
from compileflow.errors import ProcessError, RegistryUnavailableError, SpecError, VerdictError
from compileflow.registries.sqlite import SqliteRegistry
from compileflow.spec import HfTask
from flows.compile_model import CompileResult, compile_model
from flows.runner import _outcome
from tasks import policies
from tasks.register import register
from tests.conftest import ModelFactory
from tests.steps import Pipeline


def run(pipeline: Pipeline, model: Any, **fields: Any) -> State[CompileResult]:
    return compile_model(pipeline.request(model, **fields), return_state=True)


def task_states(state: State[Any]) -> dict[str, str]:
    """Return the state name of each task run of a flow run, once the server has written down all their ends."""
    deadline = time.monotonic() + 30
    with get_client(sync_client=True) as client:
        while True:
            runs = client.read_task_runs(
                flow_run_filter=FlowRunFilter(id={"any_": [state.state_details.flow_run_id]})
            )
            if runs and all(task_run.state is not None and task_run.state.is_final() for task_run in runs):
                return {task_run.name.rpartition("-")[0]: task_run.state_name for task_run in runs}
            assert time.monotonic() < deadline, runs
            time.sleep(0.2)


def test_second_run_shows_cached_steps_and_the_same_version(pipeline: Pipeline, tiny_model: ModelFactory) -> None:
    model = tiny_model(HfTask.TEXT_CLASSIFICATION)
    first = run(pipeline, model).result()
    second_state = run(pipeline, model)
    assert second_state.result().version == first.version
    assert pipeline.counts == {"compile": 1, "validate": 1}
    states = task_states(second_state)
    assert {name: states[name] for name in ("fetch", "compile", "validate", "register")} == {
        "fetch": "Cached", "compile": "Cached", "validate": "Cached", "register": "Completed",
    }  # fmt: skip


def test_version_carries_what_a_registry_must_know(pipeline: Pipeline, tiny_model: ModelFactory) -> None:
    model = tiny_model(HfTask.TEXT_CLASSIFICATION)
    state = run(pipeline, model, name="reviews")
    version = open_registry(pipeline.registry_uri).get("reviews", 1)
    assert version == state.result().version
    assert version.flow_run_id == str(state.state_details.flow_run_id)
    assert version.source_uri == model.as_uri()
    assert version.source_revision == version.source_digest
    assert version.artifact_uri.endswith(f"{version.artifact_digest}.json")
    assert version.report_uri.endswith(f"{version.report_digest}.json")
    assert (version.verdict, version.target, version.spec["hf_task"]) == (
        "pass",
        "torchscript",
        "text-classification",
    )
    assert {"rel_l2", "label_agreement", "latency_ratio", "size_bytes", "peak_rss_bytes"} <= set(version.figures)


def test_refused_compile_fails_the_run_with_its_reason_and_is_not_registered(
    pipeline: Pipeline, tiny_model: ModelFactory
) -> None:
    state = run(
        pipeline, tiny_model(HfTask.TEXT_CLASSIFICATION),
        validation={"latency_pairs": 5, "max_latency_ratio": 1e-6},
    )  # fmt: skip
    assert state.is_failed()
    assert state.message.startswith("The verdict is fail: latency_ratio measured")
    assert "\n" not in state.message
    assert isinstance(state.result(raise_on_failure=False), VerdictError)
    assert not open_registry(pipeline.registry_uri).versions()
    assert task_states(state)["validate"] == "Refused"
    assert "register" not in task_states(state)


def test_warning_is_registered_only_when_allowed(pipeline: Pipeline, tiny_model: ModelFactory) -> None:
    model = tiny_model(HfTask.FEATURE_EXTRACTION)
    few = {"latency_pairs": 5, "max_examples": 5}
    state = run(pipeline, model, validation=few)
    assert state.is_failed()
    assert state.message.startswith("The verdict is warn: neighbour_overlap")
    assert "more examples at this rate would decide" in state.message
    version = run(pipeline, model, validation=few, allow_warn=True).result().version
    assert version.verdict == "warn"


def test_register_that_is_off_reports_the_version_that_is_there(
    pipeline: Pipeline, tiny_model: ModelFactory
) -> None:
    model = tiny_model(HfTask.TEXT_CLASSIFICATION)
    switches = {"register": False}
    assert run(pipeline, model, steps=switches).result().version is None
    version = run(pipeline, model).result().version
    assert run(pipeline, model, steps=switches).result().version == version
    compiled_only = {"register": False, "validate": False}
    result = run(pipeline, model, steps=compiled_only).result()
    assert (result.version, result.validated) == (version, None)


def test_only_retryable_errors_are_retried(
    pipeline: Pipeline, tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(register, "retry_delay_seconds", [0.0, 0.0, 0.0])
    real, calls = SqliteRegistry.register, []

    def busy_once(self: SqliteRegistry, entry: Any, files: Any) -> Any:
        calls.append(entry)
        if len(calls) == 1:
            raise RegistryUnavailableError("The registry is busy.")
        return real(self, entry, files)

    monkeypatch.setattr(SqliteRegistry, "register", busy_once)
    monkeypatch.setattr("flows.registration.register", register)
    assert run(pipeline, tiny_model(HfTask.TEXT_CLASSIFICATION)).is_completed()
    assert len(calls) == 2

    state = run(pipeline, "no-such-folder/below/here")
    assert state.is_failed()
    assert "Retrying" not in task_states(state).values()


def test_backoff_grows_and_jitters() -> None:
    assert policies.RETRIES["retry_delay_seconds"](3) == [2, 4, 8]
    assert policies.RETRIES["retry_jitter_factor"] > 0


def test_unknown_parameter_is_refused_before_anything_runs() -> None:
    with pytest.raises(SpecError, match="hf_tusk"):
        compile_model({"model": "m", "hf_tusk": "fill-mask"})


@pytest.mark.parametrize(
    ("url", "says"),
    [
        (None, "raise PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"),
        ("http://127.0.0.1:9/api", "Check the Prefect server of PREFECT_API_URL"),
    ],
)
def test_server_that_does_not_start_in_time_is_one_line_that_says_what_to_do(url: str | None, says: str) -> None:
    def run() -> State[Any]:
        raise RuntimeError("Timed out while attempting to connect to ephemeral Prefect API server.")

    with temporary_settings({PREFECT_API_URL: url}):
        error = _outcome(run)
    assert isinstance(error, ProcessError)
    assert error.message.startswith("Prefect cannot run the flow: RuntimeError: Timed out while attempting")
    assert says in error.hint
