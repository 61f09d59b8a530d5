"""The automations end the runs of our flows, except questions that wait for a person."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import pytest
import yaml
from prefect.server.events.schemas.automations import EventTrigger
from prefect.server.events.schemas.events import ReceivedEvent

_FILE = Path(__file__).parents[2] / "deployments" / "automations.yaml"


def event_of(flow: str, *tags: str) -> ReceivedEvent:
    """A heartbeat of a run of a flow, as Prefect sends it."""
    related = [
        {
            "prefect.resource.id": "prefect.flow.1",
            "prefect.resource.role": "flow",
            "prefect.resource.name": flow,
        },
        *({"prefect.resource.id": f"prefect.tag.{tag}", "prefect.resource.role": "tag"} for tag in tags),
    ]
    return ReceivedEvent(
        id=uuid4(),
        occurred=datetime.now(UTC),
        received=datetime.now(UTC),
        event="prefect.flow-run.heartbeat",
        resource={"prefect.resource.id": f"prefect.flow-run.{uuid4()}"},
        related=related,
    )


@pytest.mark.parametrize(
    ("flow", "tags", "stopped", "never_started"),
    [
        ("compile-model", ("compileflow",), True, True),
        ("promote-model", ("compileflow",), False, True),
        ("compile-model", ("other",), False, False),
    ],
)
def test_automations_watch_our_runs_but_no_open_question(
    flow: str, tags: tuple[str, ...], stopped: bool, never_started: bool
) -> None:
    triggers = [
        EventTrigger.model_validate(automation["trigger"])
        for automation in yaml.safe_load(_FILE.read_text("utf-8"))["automations"]
    ]
    assert [trigger.covers(event_of(flow, *tags)) for trigger in triggers] == [stopped, never_started]
