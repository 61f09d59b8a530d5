"""revalidate: prove registered artifacts again with the runtimes that are installed today."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import chain
from math import isfinite
from typing import Literal

from compileflow.artifact.attestations.statements import (
    FAILED,
    RESULT_OF,
    Statement,
    is_revalidation,
    result,
    user_suite_digest,
)
from compileflow.artifact.verify import contradictions_of
from compileflow.catalog import get_target, open_registry, open_store
from compileflow.contracts import ACCEPTED_OUTCOMES, ModelVersion, Stage
from compileflow.errors import CompileflowError, IntegrityError, LoadError, ManifestError, ProcessKilledError
from compileflow.settings import Settings
from compileflow.steps.attest import Attester
from compileflow.steps.fetch import recorded_source
from compileflow.steps.validate import validate_artifact
from compileflow.steps.values import CompiledArtifact, FetchedSource
from compileflow.stores.layout import split_uri
from compileflow.validation.judge import load_user_suite
from compileflow.validation.settings import ValidationSettings

logger = logging.getLogger(__name__)
WHO = "revalidate"
REGRESSED, RECOVERED = "no longer passes: ", "passes again: "


@dataclass(frozen=True)
class Revalidation:
    """The outcome of a new validation.

    Attributes:
        version: The version.
        outcome: passes, regressed, or not checked.
        reason: Reason of the verdict, or why there is none.
        is_news: Whether the outcome differs from the last one that the registry holds.
    """

    version: ModelVersion
    outcome: Literal["passes", "regressed", "not checked"]
    reason: str
    is_news: bool = False


def versions_in_stages(
    registry_uri: str, settings: Settings, *, stages: Collection[Stage], names: Collection[str] = ()
) -> list[ModelVersion]:
    """Return the versions in these stages, of the given names or of all.

    Raises:
        RegistryError: The registry failed, or has no model of one of the names.
    """
    registry = open_registry(registry_uri, settings)
    versions = chain.from_iterable(map(registry.versions, names)) if names else registry.versions()
    return [version for version in versions if version.stage in stages]


def revalidate_version(
    version: ModelVersion,
    registry_uri: str,
    *,
    validation: ValidationSettings,
    timeout_s: float,
    settings: Settings,
    trust_remote_code: bool = False,
    on_progress: Callable[[str], None] = logger.info,
) -> Revalidation:
    """Validate a version from its stored artifact and source model, and note a changed outcome in the registry.

    A version whose artifact is missing or altered, that does not load any more, kills its process, or contradicts
    the manifest of its artifact has regressed. Other errors say nothing about it.

    Args:
        version: The version.
        registry_uri: URI of its registry.
        validation: How to validate.
        timeout_s: Time limit.
        settings: Credentials, work folder and threads.
        trust_remote_code: Run Python files of the models. Without it, a version that needs them is not checked.
        on_progress: Called with one line for each stage.

    Raises:
        CompileflowError: The store or the registry did not answer; the same call may succeed later.
    """
    if reason := _obstacle(version):
        return Revalidation(version, "not checked", reason)
    try:
        try:
            contradictions, manifest = contradictions_of(version, settings)
        except (IntegrityError, ManifestError) as error:
            return _noted(version, registry_uri, settings, passes=False, reason=error.message)
        if contradictions:
            return _noted(version, registry_uri, settings, passes=False, reason=contradictions[0])
        if manifest.spec.trust_remote_code and not trust_remote_code:
            reason = "it runs Python files of the model, and trust_remote_code is not set"
            return Revalidation(version, "not checked", reason)
        store_uri, _ = split_uri(version.artifact_uri)
        attester = Attester.of(open_store(store_uri, settings), settings)
        lack, verdict = attester.verdict_on(version.artifact_digest)
        if verdict is None and attester.requires_signature:
            return Revalidation(version, "not checked", f"its last verdict does not count: {lack}")
        giver = "" if verdict is None else _stricter(verdict, validation)
        if verdict is not None and result(verdict) != RESULT_OF["pass"] and giver:
            # That validation may have asked for more than this one does, so this one cannot lift it.
            reason = f"the last verdict on its artifact is {result(verdict)}, and {giver} gave it"
            if result(verdict) == FAILED:
                return _noted(version, registry_uri, settings, passes=False, reason=reason)
            return Revalidation(version, "not checked", reason)
        validated = validate_artifact(
            _source(version, attester),
            _artifact(version),
            validation,
            store_uri=store_uri,
            settings=settings,
            timeout_s=timeout_s,
            repeat=True,
            trust_remote_code=trust_remote_code,
            on_progress=on_progress,
        )
    except (LoadError, ProcessKilledError) as error:
        return _noted(version, registry_uri, settings, passes=False, reason=str(error))
    except CompileflowError as error:
        if error.retryable:
            raise
        return Revalidation(version, "not checked", str(error))
    passes = validated.outcome in ACCEPTED_OUTCOMES
    reason = validated.reason if passes else f"{validated.reason}. Report: {validated.report_uri}"
    return _noted(version, registry_uri, settings, passes=passes, reason=reason)


def _stricter(verdict: Statement, validation: ValidationSettings) -> str:
    """Return who may have asked for more than this revalidation does; "" for one with the same suite."""
    if not is_revalidation(verdict):
        return "a compile"
    own_suite = load_user_suite(validation.suite_path).digest if validation.suite_path is not None else None
    return "" if user_suite_digest(verdict) == own_suite else "a revalidation with another suite"


def _obstacle(version: ModelVersion) -> str:
    """Return why this machine cannot run a version; "" if it can."""
    try:
        target = get_target(version.target)
    except CompileflowError as error:
        return str(error)
    availability = target.probe()
    if not availability.can_run:
        return f"{target.name} cannot run here: {availability.reason}"
    return ""


def _source(version: ModelVersion, attester: Attester) -> FetchedSource:
    recorded = recorded_source(attester.store, version.source_uri, version.source_digest, attester)
    return recorded or FetchedSource(
        uri=version.source_uri,
        revision=version.source_revision,
        stored_uri=attester.store.folder_uri(version.source_digest),
        digest=version.source_digest,
        size_bytes=0,
        cached=True,
    )


def _artifact(version: ModelVersion) -> CompiledArtifact:
    return CompiledArtifact(
        uri=version.artifact_uri,
        digest=version.artifact_digest,
        # The registry does not keep the key, and a validation does not need it.
        cache_key=version.artifact_digest,
        size_bytes=int(_figure(version, "size_bytes")),
        compile_duration_s=_figure(version, "compile_duration_s"),
        peak_rss_bytes=int(_figure(version, "peak_rss_bytes")),
        cached=True,
        why="registered before",
    )


def _figure(version: ModelVersion, name: str) -> float:
    figure = version.figures.get(name, 0.0)
    return figure if isfinite(figure) else 0.0


def _noted(
    version: ModelVersion, registry_uri: str, settings: Settings, *, passes: bool, reason: str
) -> Revalidation:
    """Write a note if the outcome differs from that of the last note; without one, the version passed."""
    registry = open_registry(registry_uri, settings)
    notes = [
        promotion.reason
        for promotion in registry.promotions(version.name, version.version)
        if promotion.who == WHO
    ]
    passed_before = not notes or not notes[-1].startswith(REGRESSED)
    is_news = passes != passed_before
    if is_news:
        prefix = RECOVERED if passes else REGRESSED
        registry.note(version.name, version.version, who=WHO, reason=f"{prefix}{reason}")
    return Revalidation(version, "passes" if passes else "regressed", reason, is_news)
