"""Events that automations react to: about model versions, and about artifacts that wait for their device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from prefect.events import emit_event
from pydantic import JsonValue

from compileflow.contracts import ModelVersion
from compileflow.steps.values import CompiledArtifact

PREFIX = "compileflow.model-version"
Kind = Literal["validated", "promoted", "regressed"]


def announce(
    kind: Kind,
    version: ModelVersion,
    registry_uri: str,
    *,
    labels: Mapping[str, str] | None = None,
    **more: JsonValue,
) -> None:
    """Send an event about a registered version.

    Args:
        kind: What happened to it.
        version: The version.
        registry_uri: URI of its registry, without credentials.
        labels: Further labels, which the trigger of an automation can match.
        **more: Further values of the payload.
    """
    payload = version.model_dump(
        mode="json",
        include={"name", "version", "target", "stage", "verdict", "source_uri", "artifact_uri", "report_uri"},
    )
    emit_event(
        f"{PREFIX}.{kind}",
        resource={
            "prefect.resource.id": f"{PREFIX}.{registry_uri}#{version.name}@{version.version}",
            "prefect.resource.name": f"{version.name} version {version.version}",
            "compileflow.model": version.name,
            "compileflow.target": version.target,
            "compileflow.stage": version.stage,
            **(labels or {}),
        },
        payload={**payload, "registry_uri": registry_uri, **more},
    )


def announce_pending(artifact: CompiledArtifact, target: str) -> None:
    """Send an event about an artifact that a worker with the device has to validate."""
    emit_event(
        "compileflow.artifact.pending-device",
        resource={
            "prefect.resource.id": f"compileflow.artifact.{artifact.digest}",
            "compileflow.target": target,
        },
        payload={"artifact_uri": artifact.uri, "target": target},
    )
