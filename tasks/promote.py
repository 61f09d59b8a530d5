"""promote: move a version to a stage, or note why it was not moved."""

from __future__ import annotations

from collections.abc import Sequence

from prefect import get_run_logger, task

from compileflow.admin.promote import note_in_each, promote_version
from compileflow.settings import get_settings
from tasks.events import announce
from tasks.policies import RETRIES


@task(name="promote", description="Move the version to the stage, in every registry that has it.", **RETRIES)
def promote(
    name: str,
    version: int,
    stage: str,
    registry_uris: Sequence[str],
    *,
    who: str,
    reason: str,
    artifact_digest: str,
) -> list[str]:
    """Promote the version if it has this artifact, send an event, and return one line, for each registry."""
    versions = promote_version(
        name,
        version,
        stage,
        registry_uris=registry_uris,
        settings=get_settings(),
        who=who,
        reason=reason,
        artifact_digest=artifact_digest,
    )
    for uri, promoted in versions.items():
        announce("promoted", promoted, uri, who=who, reason=reason)
    lines = [
        f"{promoted.name} version {promoted.version} is {stage} in {uri}" for uri, promoted in versions.items()
    ]
    get_run_logger().info("; ".join(lines))
    return lines


@task(name="note", description="Record in the registries why the version was not promoted.", **RETRIES)
def note(name: str, version: int, registry_uris: Sequence[str], *, who: str, reason: str) -> None:
    """Record a note on the version in every registry that has it."""
    note_in_each(name, version, registry_uris=registry_uris, settings=get_settings(), who=who, reason=reason)
    get_run_logger().info("%s: %s", who, reason)
