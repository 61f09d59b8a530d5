"""compile: make the artifact, in a process of its own."""

from __future__ import annotations

from typing import Any

from prefect import get_run_logger, task
from prefect.states import State

from compileflow.steps.compile import compile_artifact
from compileflow.steps.request import CompileRequest
from compileflow.steps.values import FetchedSource
from tasks.policies import RETRIES, shown
from tasks.settings import settings_for


@task(name="compile", description="Compile the source model for its target.", **RETRIES)
def compile_source(source: FetchedSource, request: CompileRequest) -> State[Any]:
    """Return a CompiledArtifact."""
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
    logger.info(
        "artifact %s for %s %s: %s", artifact.digest[:12], request.target, request.precision.value,
        f"cached, {artifact.why}" if artifact.cached else f"compiled in {artifact.compile_duration_s:.1f} s",
    )  # fmt: skip
    return shown(artifact)
