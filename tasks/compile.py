"""compile: compile the source model in a child process."""

from __future__ import annotations

from typing import Any

from prefect import get_run_logger, task
from prefect.client.schemas.objects import State

from compileflow.steps.compile import compile_artifact
from compileflow.steps.request import CompileRequest
from compileflow.steps.summary import artifact_line
from compileflow.steps.values import FetchedSource
from tasks.policies import RETRIES, completed
from tasks.settings import settings_for


@task(name="compile", description="Compile the source model for its target.", **RETRIES)
def compile_source(source: FetchedSource, request: CompileRequest) -> State[Any]:
    """Return the state of a CompiledArtifact."""
    logger = get_run_logger()
    settings = settings_for(request)
    artifact = compile_artifact(
        source,
        request,
        store_uri=settings.resolved_store_uri(request.store_uri),
        settings=settings,
        enabled=request.steps.compile,
        on_progress=logger.info,
    )
    logger.info("%s %s: %s", request.target, request.precision.value, artifact_line(artifact))
    return completed(artifact)
