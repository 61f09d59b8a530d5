"""Policies of all tasks: retries, keys of Prefect artifacts, and the state of a step that reused its value.

The tasks have no Prefect cache key. The cache is in the artifact store (docs/adr/0002), where every worker sees it
and a lost artifact is a miss.
"""

from __future__ import annotations

import re
from typing import Any

from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.states import Completed
from prefect.tasks import Task, exponential_backoff

from compileflow.errors import CompileflowError
from compileflow.steps.register import default_name


def is_retryable(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Retry only errors whose `retryable` says that the same call may succeed later."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, CompileflowError) and error.retryable


RETRIES: dict[str, Any] = {
    "retries": 3,
    "retry_delay_seconds": exponential_backoff(backoff_factor=2),
    "retry_jitter_factor": 0.5,
    "retry_condition_fn": is_retryable,
    "cache_policy": NO_CACHE,
}


def prefect_key(name: str | None, source_uri: str, *parts: str) -> str:
    """Return the key of a Prefect artifact. It contains the model, so that the UI shows the model's history."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join((name or default_name(source_uri), *parts)).lower()).strip("-")


def completed(value: Any) -> State[Any]:
    """Wrap a step's value in a state: Cached with the reason if it was reused, else Completed."""
    if value.cached:
        return Completed(name="Cached", message=getattr(value, "why", "unchanged"), data=value)
    return Completed(data=value)
