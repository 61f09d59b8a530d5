"""RunProgress: a progress bar on the page of a run, which moves from step to step."""

from __future__ import annotations

from typing import cast
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact


class RunProgress:
    """The progress of one flow run, as a Prefect artifact. Create it inside the flow.

    Args:
        key: Key of the Prefect artifact.
        activity: What the run does first.
    """

    def __init__(self, key: str, activity: str) -> None:
        # Prefect's types do not know that the call is synchronous here.
        self._artifact_id = cast(UUID, create_progress_artifact(0.0, key=key, description=activity))
        self._percent = 0.0

    def advance(self, percent: float, activity: str) -> None:
        """Move the bar; it never moves back.

        Args:
            percent: Share of the run that is done, 0 to 100.
            activity: What the run does now.
        """
        self._percent = max(self._percent, percent)
        update_progress_artifact(self._artifact_id, self._percent, description=activity)
