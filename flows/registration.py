"""Register in several registries: each with its own retries, none kept back by another's failure."""

from __future__ import annotations

from typing import Any

from compileflow.contracts import ModelVersion, without_credentials
from compileflow.errors import CompileflowError, ProcessError
from compileflow.registries.several import check_all_succeeded
from compileflow.settings import get_settings
from compileflow.steps.request import CompileRequest
from compileflow.steps.values import CompiledArtifact, FetchedSource, ValidatedArtifact
from tasks.register import look_up, register

Versions = dict[str, ModelVersion]


def register_everywhere(
    source: FetchedSource, artifact: CompiledArtifact, validated: ValidatedArtifact, request: CompileRequest
) -> Versions:
    """Return the version in each registry, by the registry's URI, in the request's order.

    Raises:
        RegistryError: some failed; the next run completes them.
    """
    timed = register.with_options(timeout_seconds=request.timeouts.register_s)
    versions: Versions = {}
    errors: dict[str, CompileflowError] = {}
    for uri in registries_of(request):
        state = timed(source, artifact, validated, request, uri, return_state=True)
        outcome = state.result(raise_on_failure=False)
        if isinstance(outcome, ModelVersion):
            versions[without_credentials(uri)] = outcome
        else:
            errors[without_credentials(uri)] = as_error(outcome)
    hint = "Correct the cause and run again; registered versions stay as they are."
    check_all_succeeded("Registered", versions, errors, hint=hint)
    return versions


def find_everywhere(source: FetchedSource, artifact: CompiledArtifact, request: CompileRequest) -> Versions:
    """Return the version that holds the artifact already in each registry that has one."""
    found = {without_credentials(uri): look_up(source, artifact, request, uri) for uri in registries_of(request)}
    return {uri: version for uri, version in found.items() if version is not None}


def registries_of(request: CompileRequest) -> tuple[str, ...]:
    """Return the URIs of the registries that a request is for."""
    return get_settings().resolved_registry_uris(request.registry_uris)


def as_error(outcome: Any) -> CompileflowError:
    """Return what a failed task ended with as one of our errors."""
    if isinstance(outcome, CompileflowError):
        return outcome
    return ProcessError(f"The task ended as {type(outcome).__name__}: {outcome}")
