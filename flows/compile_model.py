"""compile_model: one source model, one target or the best of all: fetch, compile, validate, register."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.runtime import flow_run
from prefect.states import Failed, State
from pydantic import BaseModel

from compileflow.contracts import ModelVersion
from compileflow.errors import CompileflowError, VerdictError
from compileflow.selection.auto import failed_candidate, measured_candidate
from compileflow.spec import Precision
from compileflow.steps.register import check_verdict, default_name
from compileflow.steps.request import AUTO, CompileRequest
from compileflow.steps.values import CompiledArtifact, FetchedSource, ValidatedArtifact
from flows.registration import Versions, as_error, find_everywhere, register_everywhere
from tasks.auto import compare, plan
from tasks.compile import compile_source
from tasks.fetch import fetch
from tasks.publish import publish
from tasks.settings import settings_for
from tasks.validate import validate


class CompileResult(BaseModel):
    """What a run made or found.

    Attributes:
        versions: In each registry that has one, by the registry's URI.
        version: The first of them.
    """

    target: str
    precision: Precision
    source: FetchedSource
    artifact: CompiledArtifact
    validated: ValidatedArtifact | None = None
    version: ModelVersion | None = None
    versions: Versions = {}
    comparison_uri: str | None = None


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
        if request.target == AUTO:
            return compile_best(source, request)
        artifact = compile_source(source, request).result()
        if not (request.steps.validate or request.steps.register):
            return result_of(source, artifact, None, request, find_everywhere(source, artifact, request))
        validated = validate(source, artifact, request).result()
        return finish(source, artifact, validated, request)
    except CompileflowError as error:
        # A verdict is its reason; any other error says what to do, too.
        return Failed(message=error.message if isinstance(error, VerdictError) else str(error), data=error)


def compile_best(source: FetchedSource, request: CompileRequest) -> CompileResult:
    """Compile and validate every candidate, compare them, and go on with the winner as with any artifact."""
    planned = plan(source, request)
    made: list[tuple[CompiledArtifact, ValidatedArtifact] | None] = []
    candidates = []
    for each in planned.requests:
        artifact = compile_source(source, each, return_state=True).result(raise_on_failure=False)
        if not isinstance(artifact, CompiledArtifact):
            made.append(None)
            candidates.append(failed_candidate(each, as_error(artifact)))
            continue
        validated = validate(source, artifact, each, return_state=True).result(raise_on_failure=False)
        if not isinstance(validated, ValidatedArtifact):
            made.append(None)
            candidates.append(failed_candidate(each, as_error(validated), artifact))
            continue
        made.append((artifact, validated))
        candidates.append(measured_candidate(each, artifact, validated, settings_for(each)))
    compared = compare(source, request, planned, candidates)
    won = made[compared.winner] if compared.winner is not None else None
    if won is None or compared.winner is None:
        raise VerdictError(
            compared.reason, hint=f"Nothing was registered. Run: compileflow inspect {compared.comparison_uri}"
        )
    result = finish(source, *won, planned.requests[compared.winner])
    return result.model_copy(update={"comparison_uri": compared.comparison_uri})


def finish(
    source: FetchedSource, artifact: CompiledArtifact, validated: ValidatedArtifact, request: CompileRequest
) -> CompileResult:
    """Show the outcome, and register what its verdict allows."""
    publish(source, artifact, validated, request)
    check_verdict(validated, allow_warn=request.allow_warn or not request.steps.register)
    if request.steps.register:
        versions = register_everywhere(source, artifact, validated, request)
    else:
        versions = find_everywhere(source, artifact, request)
    return result_of(source, artifact, validated, request, versions)


def result_of(
    source: FetchedSource,
    artifact: CompiledArtifact,
    validated: ValidatedArtifact | None,
    request: CompileRequest,
    versions: Versions,
) -> CompileResult:
    """Put together what a run made or found."""
    return CompileResult(
        target=request.target,
        precision=request.precision,
        source=source,
        artifact=artifact,
        validated=validated,
        version=next(iter(versions.values()), None),
        versions=versions,
    )
