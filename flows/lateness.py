"""Late runs: after an outage of the worker, a scheduled run that lost its meaning ends at once."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed
from pydantic import Field

# Prefect's form takes the description from the docstring of the flow.
MaxLateness = Annotated[int | None, Field(ge=1)]


def skipped_if_late(max_lateness_s: int | None) -> State[Any] | None:
    """Return the state Skipped for a run that starts too late, else None.

    A run that starts again after a crash is not late. Skipped is a kind of Completed, because nothing failed.

    Args:
        max_lateness_s: Seconds between the scheduled time and the start; None allows any.
    """
    if max_lateness_s is None or flow_run.run_count > 1:
        return None
    lateness_s = (datetime.now(UTC) - flow_run.scheduled_start_time).total_seconds()
    if lateness_s <= max_lateness_s:
        return None
    return Completed(
        name="Skipped",
        message=f"Skipped: late. The run started {lateness_s:.0f} s after its scheduled time; the limit is "
        f"{max_lateness_s} s.",
    )
