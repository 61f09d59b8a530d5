"""RunProgress: a progress bar on the page of a run, which moves from step to step."""

from __future__ import annotations

from typing import cast
from uuid import UUID

from httpx import ConnectError
from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact

from tasks.server import patiently


class RunProgress:
    """The progress of one flow run, as a Prefect artifact. Create it inside the flow.

    Args:
        key: Key of the Prefect artifact.
        activity: What the run does first.
    """

    def __init__(self, key: str, activity: str) -> None:
        # Prefect's types do not know that the call is synchronous here.
        self._artifact_id = cast(UUID, patiently(create_progress_artifact, 0.0, key=key, description=activity))
        self._percent = 0.0

    def advance(self, percent: float, activity: str) -> None:
        """Move the bar; it never moves back. While the server does not answer, it stays where it is.

        Args:
            percent: Share of the run that is done, 0 to 100.
            activity: What the run does now.
        """
        self._percent = max(self._percent, percent)
        try:
            update_progress_artifact(self._artifact_id, self._percent, description=activity)
        except ConnectError as error:
            get_run_logger().warning("the progress bar cannot move to %s: %s", activity, error)
