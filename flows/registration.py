"""Register in several registries: each one has its own task run with its own retries."""

from __future__ import annotations

from typing import Any

from compileflow.contracts import ModelVersion
from compileflow.errors import CompileflowError, ProcessError
from compileflow.settings import get_settings
from compileflow.steps.request import CompileRequest
from compileflow.steps.run import Versions, find_in_each, register_in_each
from compileflow.steps.values import CompiledArtifact, FetchedSource, ValidatedArtifact
from tasks.register import look_up, register


def register_everywhere(
    source: FetchedSource, artifact: CompiledArtifact, validated: ValidatedArtifact, request: CompileRequest
) -> Versions:
    """Register the artifact in each registry of the request.

    Raises:
        RegistryError: Some registries failed; the next run completes them.
    """
    register_task = register.with_options(timeout_seconds=request.timeouts.register_s)

    def register_one(registry_uri: str) -> ModelVersion | CompileflowError:
        state = register_task(source, artifact, validated, request, registry_uri, return_state=True)
        outcome = state.result(raise_on_failure=False)
        return outcome if isinstance(outcome, ModelVersion) else as_error(outcome)

    return register_in_each(registry_uris(request), register_one)


def find_everywhere(source: FetchedSource, artifact: CompiledArtifact, request: CompileRequest) -> Versions:
    """Return the version that holds the artifact already, in each registry that has one."""
    return find_in_each(registry_uris(request), lambda uri: look_up(source, artifact, request, uri))


def registry_uris(request: CompileRequest) -> tuple[str, ...]:
    """Return the URIs of a request's registries."""
    return get_settings().resolved_registry_uris(request.registry_uris)


def as_error(outcome: Any) -> CompileflowError:
    """Return the outcome of a failed task as an error of compileflow's tree."""
    if isinstance(outcome, CompileflowError):
        return outcome
    return ProcessError(f"The task ended as {type(outcome).__name__}: {outcome}")
