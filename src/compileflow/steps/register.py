"""register: make a proven artifact a version in the model registry, and refuse any other."""

from __future__ import annotations

import re

from compileflow.catalog import open_registry, open_store
from compileflow.contracts import ModelVersion, VersionEntry
from compileflow.errors import VerdictError
from compileflow.manifest import read_manifest
from compileflow.steps.values import CompiledArtifact, FetchedSource, ValidatedArtifact


def register_version(
    source: FetchedSource,
    artifact: CompiledArtifact,
    validated: ValidatedArtifact,
    *,
    name: str | None,
    allow_warn: bool,
    store_uri: str,
    registry_uri: str,
    flow_run_id: str | None = None,
) -> ModelVersion:
    """Register an artifact; the same artifact under the same name again gives the same version.

    Raises:
        VerdictError: the report is on another artifact, or its verdict does not allow registering.
        RegistryError: the registry refused.
    """
    if validated.artifact_digest != artifact.digest:
        raise VerdictError(
            f"The report is on {validated.artifact_digest[:12]}..., the artifact is {artifact.digest[:12]}...",
            hint="Validate this artifact.",
        )
    if validated.outcome == "warn" and not allow_warn:
        raise VerdictError(
            f"Not registered: {validated.reason}.",
            hint="Read the report; to register all the same, set allow_warn.",
        )
    if validated.outcome not in ("pass", "warn"):
        raise VerdictError(f"Not registered: {validated.reason}.", hint=f"Report: {validated.report_uri}")
    with open_store(store_uri).open_folder(artifact.digest) as folder:
        manifest = read_manifest(folder)
    figures = validated.figures | {
        "size_bytes": float(artifact.size_bytes),
        "compile_duration_s": artifact.compile_duration_s,
        "peak_rss_bytes": float(artifact.peak_rss_bytes),
    }
    return open_registry(registry_uri).register(
        VersionEntry(
            name=name or default_name(source.uri),
            target=manifest.target.name,
            spec=manifest.spec.model_dump(mode="json"),
            source_uri=source.uri,
            source_revision=source.revision,
            source_digest=source.digest,
            artifact_uri=artifact.uri,
            artifact_digest=artifact.digest,
            verdict=validated.outcome,
            figures=figures,
            report_uri=validated.report_uri,
            report_digest=validated.report_digest,
            flow_run_id=flow_run_id,
        )
    )


def default_name(source_uri: str) -> str:
    """Make a registry name of the last part of a model's URI.

    >>> default_name("hf://sentence-transformers/all-MiniLM-L6-v2")
    'all-MiniLM-L6-v2'
    """
    last = source_uri.rstrip("/").rpartition("/")[2]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", last).lstrip("._-")
    return name[:128] or "model"
