"""fetch: bring the source model into the artifact store."""

from __future__ import annotations

from typing import Any

from prefect import get_run_logger, task
from prefect.client.schemas.objects import State

from compileflow.steps.fetch import fetch_source
from compileflow.steps.request import CompileRequest
from compileflow.steps.summary import source_line
from tasks.policies import RETRIES, completed
from tasks.settings import settings_for


@task(name="fetch", description="Pin the source model and put it into the artifact store.", **RETRIES)
def fetch(request: CompileRequest) -> State[Any]:
    """Return the state of a FetchedSource."""
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
    logger.info(source_line(source))
    return completed(source)
