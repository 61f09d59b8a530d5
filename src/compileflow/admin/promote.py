"""promote: move a registered version to a stage, in every registry that has it, if its verdict allows."""

from __future__ import annotations

from collections.abc import Sequence

from compileflow.catalog import open_registry
from compileflow.contracts import STAGES, ModelVersion, Stage, without_credentials
from compileflow.errors import CompileflowError, SpecError, VerdictError
from compileflow.registries.several import check_all_succeeded
from compileflow.settings import Settings

_SERVING: tuple[Stage, ...] = ("staging", "production")


def promote_version(
    name: str,
    version: int,
    stage: str,
    *,
    registry_uris: Sequence[str],
    settings: Settings,
    who: str,
    reason: str = "",
    force: bool = False,
) -> dict[str, ModelVersion]:
    """Move a version to a stage; calling again completes what failed.

    Args:
        name: Model's name.
        version: Its number in the first registry; in the others the version of the same artifact is meant.
        stage: One of `STAGES`.
        registry_uris: Those that are told; one that has not the artifact is left out.
        settings: Tokens and timeouts.
        who: Who promotes; kept with the version.
        reason: Why; kept with the version.
        force: Promote a version whose verdict is not pass; needs a reason.

    Returns:
        The version as it is now, by registry.

    Raises:
        SpecError: no such stage, or force without a reason.
        VerdictError: the verdict is not pass.
        RegistryError: no such version, or a registry failed.
    """
    if stage not in STAGES:
        raise SpecError(f"{stage!r} is no stage.", hint=f"Choose one of: {', '.join(STAGES)}.")
    if force and not reason.strip():
        raise SpecError("--force was given without a reason.", hint='Say why, with --reason "...".')
    first, *others = registry_uris
    found = open_registry(first, settings).get(name, version)
    if stage in _SERVING and found.verdict != "pass" and not force:
        raise VerdictError(
            f"{name} version {version} has the verdict {found.verdict}, and {stage} takes only pass.",
            hint="Read its report. To promote it all the same, give --force and --reason.",
        )
    todo = {first: version}
    for uri in others:
        same = [each for each in open_registry(uri, settings).find(found.artifact_digest) if each.name == name]
        if same:
            todo[uri] = same[0].version
    done: dict[str, ModelVersion] = {}
    errors: dict[str, CompileflowError] = {}
    for uri, number in todo.items():
        try:
            done[without_credentials(uri)] = open_registry(uri, settings).set_stage(
                name, number, stage, who=who, reason=reason
            )
        except CompileflowError as error:
            errors[without_credentials(uri)] = error
    check_all_succeeded("Promoted", done, errors, hint="Run the same command again.")
    return done
