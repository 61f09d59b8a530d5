"""fetch: bring the source model into the artifact store."""

from __future__ import annotations

from typing import Any

from prefect import get_run_logger, task
from prefect.states import State

from compileflow.steps.fetch import fetch_source
from compileflow.steps.request import CompileRequest
from tasks.policies import RETRIES, shown
from tasks.settings import settings_for


@task(name="fetch", description="Pin the source model and put it into the artifact store.", **RETRIES)
def fetch(request: CompileRequest) -> State[Any]:
    """Return a FetchedSource."""
    logger = get_run_logger()
    settings = settings_for(request)
    source = fetch_source(
        request.model,
        request.revision,
        store_uri=settings.resolved_store_uri(request.store_uri),
        settings=settings,
        enabled=request.steps.fetch,
        on_progress=logger.info,
    )
    logger.info("source model %s at %s%s", source.uri, source.revision[:12], " (cached)" if source.cached else "")
    return shown(source)
