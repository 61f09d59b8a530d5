"""One run of the four steps in this process: fetch, compile, validate, register.

The Prefect flow composes the same steps from tasks; both return a CompileResult.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from pydantic import BaseModel, ConfigDict

from compileflow.contracts import ModelVersion, without_credentials
from compileflow.errors import CompileflowError
from compileflow.registries.several import check_all_succeeded
from compileflow.settings import Settings
from compileflow.spec import Precision
from compileflow.steps.compile import compile_artifact
from compileflow.steps.fetch import fetch_source
from compileflow.steps.preflight import check_request
from compileflow.steps.register import check_verdict, find_version, register_version
from compileflow.steps.request import CompileRequest
from compileflow.steps.summary import artifact_line, source_line, verdict_line, version_line
from compileflow.steps.validate import validate_artifact
from compileflow.steps.values import CompiledArtifact, FetchedSource, ValidatedArtifact

logger = logging.getLogger(__name__)

# Versions by the URI of their registry, without credentials.
Versions = dict[str, ModelVersion]


class CompileResult(BaseModel):
    """Outcome of a run that succeeded.

    Attributes:
        artifact: Artifact of the run; None if it only fetched the source model.
        validated: Verdict on the artifact; None if the run needed none.
        version: Version in the first registry that has one.
        versions: Version in each registry that has one, by the registry's URI.
        comparison_uri: Stored comparison of the candidates, for target auto.
    """

    model_config = ConfigDict(frozen=True)

    target: str
    precision: Precision
    source: FetchedSource
    artifact: CompiledArtifact | None = None
    validated: ValidatedArtifact | None = None
    version: ModelVersion | None = None
    versions: Versions = {}
    comparison_uri: str | None = None

    @classmethod
    def of(
        cls,
        request: CompileRequest,
        source: FetchedSource,
        artifact: CompiledArtifact | None = None,
        validated: ValidatedArtifact | None = None,
        versions: Versions | None = None,
    ) -> CompileResult:
        """Combine the outcomes of the steps."""
        return cls(
            target=request.target,
            precision=request.precision,
            source=source,
            artifact=artifact,
            validated=validated,
            version=next(iter((versions or {}).values()), None),
            versions=versions or {},
        )


class Progress(Protocol):
    """Display of a run's progress."""

    def step(self, name: str) -> AbstractContextManager[Callable[[str], None]]:
        """Show one step from its start to its end.

        Args:
            name: Name of the step, for example "compile".

        Returns:
            A context manager whose value is called with each progress line of the step.
        """


class LoggedProgress:
    """Progress lines in the log of this module."""

    @contextmanager
    def step(self, name: str) -> Iterator[Callable[[str], None]]:
        """Log each line with the name of its step."""

        def log(line: str) -> None:
            logger.info("%s: %s", name, line)

        yield log


class StepRunner:
    """The four steps of one request, with its store and settings.

    Args:
        request: The request.
        settings: Default store and registries, credentials, work folder and threads.
        progress: Display of the steps.
        label: Suffix of the steps' names, to tell the candidates of target auto apart.
    """

    def __init__(
        self, request: CompileRequest, settings: Settings, *, progress: Progress, label: str = ""
    ) -> None:
        self._request = request
        self._settings = settings
        self._progress = progress
        self._label = f" {label}" if label else ""
        self._store_uri = settings.resolved_store_uri(request.store_uri)

    def fetch(self) -> FetchedSource:
        """Check what later steps need, and bring the source model into the store.

        Raises as `check_request` and `fetch_source` do.
        """
        check_request(self._request, self._settings)
        with self._progress.step("fetch") as show:
            source = fetch_source(
                self._request.model,
                self._request.revision,
                store_uri=self._store_uri,
                settings=self._settings,
                enabled=self._request.steps.fetch,
                on_progress=show,
            )
            show(source_line(source))
        return source

    def compile(self, source: FetchedSource) -> CompiledArtifact:
        """Compile the source model. Raises as `compile_artifact` does."""
        with self._progress.step(f"compile{self._label}") as show:
            artifact = compile_artifact(
                source,
                self._request,
                store_uri=self._store_uri,
                settings=self._settings,
                enabled=self._request.steps.compile,
                on_progress=show,
            )
            show(artifact_line(artifact))
        return artifact

    def validate(self, source: FetchedSource, artifact: CompiledArtifact) -> ValidatedArtifact:
        """Prove the artifact. Raises as `validate_artifact` does."""
        with self._progress.step(f"validate{self._label}") as show:
            validated = validate_artifact(
                source,
                artifact,
                self._request.validation,
                store_uri=self._store_uri,
                settings=self._settings,
                timeout_s=self._request.timeouts.validate_s,
                request=self._request,
                enabled=self._request.steps.validate,
                trust_remote_code=self._request.trust_remote_code,
                on_progress=show,
            )
            show(verdict_line(validated))
        return validated

    def register(
        self, source: FetchedSource, artifact: CompiledArtifact, validated: ValidatedArtifact
    ) -> Versions:
        """Register the artifact in every registry, or find its versions if the register step is off.

        Raises:
            VerdictError: The verdict does not allow registering.
            RegistryError: Some registries failed; the next run completes them.
        """
        request = self._request
        check_verdict(validated, allow_warn=request.allow_warn or not request.steps.register)
        if not request.steps.register:
            return self.find(source, artifact)
        with self._progress.step("register") as show:

            def register_one(registry_uri: str) -> ModelVersion | CompileflowError:
                try:
                    version = register_version(
                        source,
                        artifact,
                        validated,
                        name=request.name,
                        allow_warn=request.allow_warn,
                        store_uri=self._store_uri,
                        registry_uri=registry_uri,
                        settings=self._settings,
                    )
                except CompileflowError as error:
                    return error
                show(version_line(version, registry_uri))
                return version

            return register_in_each(self._registry_uris(), register_one)

    def find(self, source: FetchedSource, artifact: CompiledArtifact) -> Versions:
        """Return the versions that hold the artifact already. Raises as `find_version` does."""
        return find_in_each(
            self._registry_uris(),
            lambda registry_uri: find_version(
                source, artifact, name=self._request.name, registry_uri=registry_uri, settings=self._settings
            ),
        )

    def _registry_uris(self) -> Sequence[str]:
        return self._settings.resolved_registry_uris(self._request.registry_uris)


def run_request(request: CompileRequest, settings: Settings, *, progress: Progress | None = None) -> CompileResult:
    """Fetch, compile, validate and register one model for one target.

    The time limits of the compile and validate steps apply. Fetch and register run in this process without one.
    No step is retried.

    Args:
        request: A request for one target; `selection.run` runs target auto.
        settings: Default store and registries, credentials, work folder and threads.
        progress: Display of the steps; None logs them.

    Raises:
        CompileflowError: A step failed. Completed steps are cached, so that the next run resumes.
        VerdictError: The artifact did not pass its gates, and was not registered.
    """
    steps = StepRunner(request, settings, progress=progress or LoggedProgress())
    source = steps.fetch()
    if request.steps.only_fetch:
        return CompileResult.of(request, source)
    artifact = steps.compile(source)
    if not request.steps.need_verdict:
        return CompileResult.of(request, source, artifact, None, steps.find(source, artifact))
    validated = steps.validate(source, artifact)
    return CompileResult.of(request, source, artifact, validated, steps.register(source, artifact, validated))


def register_in_each(
    registry_uris: Sequence[str], register_one: Callable[[str], ModelVersion | CompileflowError]
) -> Versions:
    """Register in several registries, so that the failure of one does not stop the others.

    Args:
        registry_uris: URIs of the registries, in the order of the result.
        register_one: Registers in the registry of a URI and returns the version, or its error.

    Raises:
        RegistryError: Some registries failed; the message names them.
    """
    versions: Versions = {}
    errors: dict[str, CompileflowError] = {}
    for registry_uri in registry_uris:
        outcome = register_one(registry_uri)
        if isinstance(outcome, ModelVersion):
            versions[without_credentials(registry_uri)] = outcome
        else:
            errors[without_credentials(registry_uri)] = outcome
    hint = "Correct the cause and run again; registered versions stay."
    check_all_succeeded("Registered", versions, errors, hint=hint)
    return versions


def find_in_each(registry_uris: Sequence[str], find_one: Callable[[str], ModelVersion | None]) -> Versions:
    """Return the version of an artifact in each registry that has one.

    Args:
        registry_uris: URIs of the registries, in the order of the result.
        find_one: Looks the artifact up in the registry of a URI.
    """
    versions = {without_credentials(registry_uri): find_one(registry_uri) for registry_uri in registry_uris}
    return {registry_uri: version for registry_uri, version in versions.items() if version is not None}
