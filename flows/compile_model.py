"""compile_model: one source model, one target: fetch, compile, validate, register."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.runtime import flow_run
from prefect.states import Failed, State
from pydantic import BaseModel

from compileflow.contracts import ModelVersion
from compileflow.errors import CompileflowError, VerdictError
from compileflow.steps.register import check_verdict, default_name
from compileflow.steps.request import CompileRequest
from compileflow.steps.values import CompiledArtifact, FetchedSource, ValidatedArtifact
from tasks.compile import compile_source
from tasks.fetch import fetch
from tasks.publish import publish
from tasks.register import look_up, register
from tasks.validate import validate


class CompileResult(BaseModel):
    """What a run made or found."""

    target: str
    source: FetchedSource
    artifact: CompiledArtifact
    validated: ValidatedArtifact | None = None
    version: ModelVersion | None = None


def _run_name() -> str:
    request = CompileRequest.model_validate(flow_run.parameters["request"])
    return f"{request.name or default_name(request.model)} for {request.target}"


@flow(
    name="compile-model",
    description="Compile a transformers model for a target, prove the result, store it and register it.",
    flow_run_name=_run_name,
)
def compile_model(request: CompileRequest) -> CompileResult | State[Any]:
    """Run the four steps; a refused compile, like any error, ends the run as Failed with its reason."""
    try:
        source = fetch.with_options(timeout_seconds=request.timeouts.fetch_s)(request).result()
        artifact = compile_source(source, request).result()
        if not (request.steps.validate or request.steps.register):
            return CompileResult(
                target=request.target,
                source=source,
                artifact=artifact,
                version=look_up(source, artifact, request),
            )
        validated = validate(source, artifact, request).result()
        publish(source, artifact, validated, request)
        check_verdict(validated, allow_warn=request.allow_warn or not request.steps.register)
        if request.steps.register:
            timed = register.with_options(timeout_seconds=request.timeouts.register_s)
            version = timed(source, artifact, validated, request)
        else:
            version = look_up(source, artifact, request)
    except CompileflowError as error:
        # A verdict is its reason; any other error says what to do, too.
        return Failed(message=error.message if isinstance(error, VerdictError) else str(error), data=error)
    return CompileResult(
        target=request.target, source=source, artifact=artifact, validated=validated, version=version
    )
