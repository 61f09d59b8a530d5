"""A run that starts too long after its time ends at once; every other run works."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow
from prefect.states import Scheduled, State

from compileflow.steps.request import CompileRequest
from flows.compile_model import compile_model


def run_due(late_s: float, *limits: int | None, model: Path) -> State[Any]:
    """Run the flow as a worker does: a run that was due some seconds ago, once with each of the limits."""
    request = CompileRequest(model=str(model)).model_dump(mode="json")
    due = datetime.now(UTC) - timedelta(seconds=late_s)
    with get_client(sync_client=True) as client:
        run_id = client.create_flow_run(
            compile_model, parameters={"request": request}, state=Scheduled(scheduled_time=due)
        ).id
        for limit in limits:
            client.set_flow_run_state(run_id, Scheduled(), force=True)
            run = client.read_flow_run(run_id)
            parameters = {"request": request, "max_lateness_s": limit}
            state: State[Any] = run_flow(compile_model, flow_run=run, parameters=parameters, return_type="state")
    return state


@pytest.mark.parametrize(
    ("late_s", "max_lateness_s", "name"),
    [(70, 60, "Skipped"), (0, 60, "Failed"), (3600, None, "Failed")],
    ids=["too late", "in time", "no limit"],
)
def test_only_a_run_beyond_its_limit_is_skipped(
    tmp_path: Path, late_s: float, max_lateness_s: int | None, name: str
) -> None:
    state = run_due(late_s, max_lateness_s, model=tmp_path / "nothing")
    # A run that works finds that the model does not exist.
    assert state.name == name
    if name == "Skipped":
        assert state.is_completed()
        assert state.message is not None
        assert state.message.startswith("Skipped: late. The run started 7")
        assert state.message.endswith("the limit is 60 s.")


def test_second_attempt_of_a_run_works_however_late_it_is(tmp_path: Path) -> None:
    assert run_due(70, None, 60, model=tmp_path / "nothing").name == "Failed"
