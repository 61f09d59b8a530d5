"""pull: download a registered version's artifact, with its attestations, into a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from compileflow._process.folders import os_errors
from compileflow.artifact.attestations.envelopes import write_bundle
from compileflow.artifact.integrity import check_registered_uri
from compileflow.artifact.open import copy_artifact, open_artifact
from compileflow.artifact.verify import attestations_of
from compileflow.catalog import parse_reference, resolve_reference
from compileflow.contracts import ModelVersion
from compileflow.settings import Settings


@dataclass(frozen=True)
class PulledVersion:
    """A registered version, and the folder that holds a verified copy of its artifact."""

    version: ModelVersion
    folder: Path


def pull_version(
    reference: str, folder: str | Path, *, registry_uri: str | None = None, settings: Settings
) -> PulledVersion:
    """Download a registered version's artifact and check every byte.

    Args:
        reference: NAME, NAME@STAGE or NAME@NUMBER, with or without the prefix "registry:". A complete reference
            names its own registry.
        folder: Folder to write to; empty or absent.
        registry_uri: Registry of a reference that names none; None is the configured one.
        settings: Default registry and credentials.

    Raises:
        SpecError: The reference is malformed.
        RegistryError: The registry has no such version.
        IntegrityError: The stored artifact is not the one that was registered.
        StoreError: The artifact cannot be read, or the folder cannot be written.
    """
    # Without its prefix, registry:NAME is looked up in `registry_uri` as NAME is.
    reference = reference.removeprefix("registry:")
    if parse_reference(reference) is None:
        reference = f"{settings.resolved_registry_uri(registry_uri)}#{reference}"
    version = resolve_reference(reference, settings)
    check_registered_uri(version)
    artifact = open_artifact(version.artifact_uri, digest=version.artifact_digest, settings=settings)
    copy = copy_artifact(artifact, folder)
    # The local cache may have the artifact from before its validation, without the verdict.
    envelopes = attestations_of(version.artifact_uri, settings=settings)
    with os_errors(copy, "write to"):
        write_bundle(copy, envelopes)
    return PulledVersion(version, copy)
