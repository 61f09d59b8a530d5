"""validate: prove that the artifact answers like its source model."""

from __future__ import annotations

from typing import Any

from prefect import get_run_logger, task
from prefect.client.schemas.objects import State
from prefect.states import Completed

from compileflow.contracts import PENDING
from compileflow.steps.request import CompileRequest
from compileflow.steps.summary import verdict_line
from compileflow.steps.validate import validate_artifact
from compileflow.steps.values import CompiledArtifact, FetchedSource
from tasks.policies import RETRIES, completed
from tasks.settings import settings_for


@task(name="validate", description="Compare the artifact with its source model and judge it.", **RETRIES)
def validate(source: FetchedSource, artifact: CompiledArtifact, request: CompileRequest) -> State[Any]:
    """Return the state of a ValidatedArtifact, named Refused if the verdict is fail or error."""
    logger = get_run_logger()
    settings = settings_for(request)
    validated = validate_artifact(
        source,
        artifact,
        request.validation,
        store_uri=settings.resolved_store_uri(request.store_uri),
        settings=settings,
        timeout_s=request.timeouts.validate_s,
        request=request,
        enabled=request.steps.validate,
        trust_remote_code=request.trust_remote_code,
        on_progress=logger.info,
    )
    logger.info(verdict_line(validated))
    if validated.outcome == PENDING:
        return Completed(name="Pending", message=validated.reason, data=validated)
    if validated.outcome in ("fail", "error"):
        return Completed(name="Refused", message=validated.reason, data=validated)
    return completed(validated)
