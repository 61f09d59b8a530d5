"""promote: move a registered version to a stage in every registry that has it, if its verdict allows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from compileflow.artifact.verify import check_version
from compileflow.catalog import open_registry
from compileflow.contracts import STAGES, ModelVersion, Stage, without_credentials
from compileflow.errors import (
    CompileflowError,
    ManifestError,
    RegistryError,
    SignatureError,
    SpecError,
    StoreError,
    VerdictError,
)
from compileflow.registries.several import check_all_succeeded
from compileflow.settings import Settings

_SERVING_STAGES: tuple[Stage, ...] = ("staging", "production")


def promote_version(
    name: str,
    version: int | Stage,
    stage: str,
    *,
    registry_uris: Sequence[str],
    settings: Settings,
    who: str,
    reason: str = "",
    force: bool = False,
    artifact_digest: str | None = None,
) -> dict[str, ModelVersion]:
    """Move a version to a stage. After a failure, the same call completes the other registries.

    Args:
        name: Name of the model.
        version: Number, or stage that the version is in, in the first registry. In the others, the version of the
            same artifact is promoted.
        stage: One of `STAGES`.
        registry_uris: URIs of the registries. A registry that does not have the artifact is skipped.
        settings: Tokens and timeouts.
        who: Name of the person who promotes; the registry keeps it with the version.
        reason: Reason for the promotion; the registry keeps it with the version.
        force: Promote even a version that did not pass; this needs a reason. Its artifact must be readable, and
            its statements sound, all the same. Where signatures are required, so is a signed verdict PASSED.
        artifact_digest: The artifact that was agreed on; None takes the one that the version has.

    Returns:
        The promoted version in each registry, by URI.

    Raises:
        SpecError: The stage is unknown, or force was given without a reason.
        SignatureError: The stage serves, and a statement is about another artifact or was altered, or a signature
            is required and missing.
        StoreError: The stage serves, and the artifact is missing or altered, or is not what was registered.
        ManifestError: The same, with a URI or a manifest that cannot be read.
        VerdictError: The verdict is not pass, or the last validation of the artifact did not pass.
        RegistryError: The version does not exist or has another artifact, or a registry failed.
    """
    if stage not in STAGES:
        raise SpecError(f"Unknown stage {stage!r}.", hint=f"Choose one of: {', '.join(STAGES)}.")
    if force and not reason.strip():
        raise SpecError("Force was given without a reason.", hint='Give the reason, with --reason "...".')
    versions = same_versions(name, version, registry_uris=registry_uris, settings=settings)
    for candidate in versions.values():
        if artifact_digest not in (None, candidate.artifact_digest):
            raise RegistryError(
                f"{name} version {candidate.version} has the artifact {candidate.artifact_digest[:12]} by now; "
                f"{artifact_digest[:12]} was agreed on.",
                hint="Find out who changed the registry.",
            )
    check_promotable(versions.values(), stage, settings, force=force)
    promotions: dict[str, ModelVersion] = {}
    errors: dict[str, CompileflowError] = {}
    for uri, candidate in versions.items():
        try:
            promotions[without_credentials(uri)] = open_registry(uri, settings).set_stage(
                name, candidate.version, stage, who=who, reason=reason
            )
        except CompileflowError as error:
            errors[without_credentials(uri)] = error
    check_all_succeeded("Promoted", promotions, errors, hint="Run the same command again.")
    return promotions


def same_versions(
    name: str, version: int | Stage, *, registry_uris: Sequence[str], settings: Settings
) -> dict[str, ModelVersion]:
    """Return a version of the first registry, and the versions of the same artifact and name in the others.

    Returns:
        The version in each registry that has the artifact, by URI.

    Raises:
        RegistryError: The version does not exist in the first registry.
    """
    first_uri, *other_uris = registry_uris
    version_record = open_registry(first_uri, settings).get(name, version)
    versions = {first_uri: version_record}
    for uri in other_uris:
        digest = version_record.artifact_digest
        same = [
            candidate
            for candidate in open_registry(uri, settings).find(digest)
            # What a registry looks a version up by may contradict what it says about it.
            if (candidate.name, candidate.artifact_digest) == (name, digest)
        ]
        if same:
            versions[uri] = same[0]
    return versions


def check_promotable(
    versions: Iterable[ModelVersion], stage: str, settings: Settings, *, force: bool = False
) -> None:
    """Refuse versions that must not enter a stage. With `force`, only artifacts, statements and signatures count.

    Raises:
        StoreError: The stage serves, and an artifact is missing or altered, or is not what was registered.
        ManifestError: The same, with a URI or a manifest that cannot be read.
        SignatureError: The stage serves, and a statement is about another artifact or was altered, or a signature
            is required and missing.
        VerdictError: The stage serves, and a verdict is not pass, or the last validation did not pass.
    """
    if stage not in _SERVING_STAGES:
        return
    versions = list(versions)
    for version in versions:
        if version.verdict != "pass" and not force:
            raise _not_passed(f"{version.name} version {version.version} has the verdict {version.verdict}", stage)
    for version in versions:
        try:
            result = check_version(version, settings).result
        except (ManifestError, SignatureError, StoreError) as error:
            raise type(error)(
                f"{version.name} version {version.version} cannot enter {stage}: {error.message}", hint=error.hint
            ) from error
        if settings.require_signature and result != "PASSED":
            raise SignatureError(
                f"{version.name} version {version.version} cannot enter {stage}: a signed verdict PASSED is "
                f"required, found {result}.",
                hint="Validate it again with a trusted key; --force does not lift COMPILEFLOW_REQUIRE_SIGNATURE.",
            )
        if result not in (None, "PASSED") and not force:
            problem = f"The last validation of {version.name} version {version.version} has the result {result}"
            raise _not_passed(problem, stage)


def note_in_each(
    name: str, version: int, *, registry_uris: Sequence[str], settings: Settings, who: str, reason: str
) -> None:
    """Record a note on a version in every registry that has it. Raises as `same_versions` does."""
    versions = same_versions(name, version, registry_uris=registry_uris, settings=settings)
    for uri, candidate in versions.items():
        open_registry(uri, settings).note(name, candidate.version, who=who, reason=reason)


def _not_passed(problem: str, stage: str) -> VerdictError:
    return VerdictError(
        f"{problem}, but {stage} takes only pass.",
        hint="Read its report. To promote it regardless, give --force and --reason.",
    )
