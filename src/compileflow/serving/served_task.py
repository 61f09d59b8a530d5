"""served_task: the task that an artifact is to serve, which may differ from the one it was compiled for."""

from __future__ import annotations

from contextlib import suppress

from compileflow.artifact.open import OpenArtifact
from compileflow.errors import LoadError
from compileflow.spec import HfTask


def served_task(artifact: OpenArtifact, requested_task: HfTask | str | None) -> HfTask:
    """Return the task that an artifact is to serve; None requests the task that it was compiled for.

    Raises:
        LoadError: The artifact does not serve the requested task.
    """
    compiled_task = artifact.manifest.hf_task
    if requested_task is None:
        return compiled_task
    served_tasks = [task for task in HfTask if task.graph_task is compiled_task.graph_task]
    with suppress(ValueError):
        task = HfTask(requested_task)
        if task in served_tasks:
            return task
    raise LoadError(
        f"The artifact was compiled for {compiled_task.value} and does not serve {str(requested_task)!r}.",
        hint=f"It serves: {', '.join(served_tasks)}.",
    )
