"""validate: prove that the artifact answers like its source model."""

from __future__ import annotations

from typing import Any

from prefect import get_run_logger, task
from prefect.states import Completed, State

from compileflow.steps.request import CompileRequest
from compileflow.steps.validate import validate_artifact
from compileflow.steps.values import CompiledArtifact, FetchedSource
from tasks.policies import RETRIES, shown
from tasks.settings import settings_for


@task(name="validate", description="Compare the artifact with its source model and judge it.", **RETRIES)
def validate(source: FetchedSource, artifact: CompiledArtifact, request: CompileRequest) -> State[Any]:
    """Return a ValidatedArtifact; a refused one shows as the state Refused."""
    logger = get_run_logger()
    settings = settings_for(request)
    validated = validate_artifact(
        source,
        artifact,
        request.validation,
        store_uri=settings.resolved_store_uri(request.store_uri),
        settings=settings,
        timeout_s=request.timeouts.validate_s,
        enabled=request.steps.validate,
        on_progress=logger.info,
    )
    logger.info("verdict %s%s", validated.reason, " (cached)" if validated.cached else "")
    if validated.outcome in ("fail", "error"):
        return Completed(name="Refused", message=validated.reason, data=validated)
    return shown(validated)
