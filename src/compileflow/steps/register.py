"""register: make a proven artifact a version in the model registry, and refuse any other."""

from __future__ import annotations

import logging
import re
from contextlib import ExitStack
from dataclasses import replace

from compileflow.artifact.manifest import read_manifest
from compileflow.catalog import open_registry, open_store
from compileflow.contracts import ModelVersion, VersionEntry, VersionFiles
from compileflow.errors import VerdictError
from compileflow.settings import Settings
from compileflow.steps.values import CompiledArtifact, FetchedSource, ValidatedArtifact
from compileflow.validation.report import TEST_FILES

logger = logging.getLogger(__name__)


def register_version(
    source: FetchedSource,
    artifact: CompiledArtifact,
    validated: ValidatedArtifact,
    *,
    name: str | None,
    allow_warn: bool,
    store_uri: str,
    registry_uri: str,
    settings: Settings,
    flow_run_id: str | None = None,
) -> ModelVersion:
    """Register an artifact in one registry; the same artifact under the same name again gives the same version.

    Raises:
        VerdictError: the report is on another artifact, or its verdict does not allow registering.
        RegistryError: the registry refused.
    """
    if validated.artifact_digest != artifact.digest:
        raise VerdictError(
            f"The report is on {validated.artifact_digest[:12]}..., the artifact is {artifact.digest[:12]}...",
            hint="Validate this artifact.",
        )
    check_verdict(validated, allow_warn=allow_warn)
    store = open_store(store_uri, settings)
    figures = validated.figures | {
        "size_bytes": float(artifact.size_bytes),
        "compile_duration_s": artifact.compile_duration_s,
        "peak_rss_bytes": float(artifact.peak_rss_bytes),
    }
    wanted = name or default_name(source.uri)
    with ExitStack() as stack:
        files = VersionFiles(
            artifact=stack.enter_context(store.open_folder(artifact.digest)),
            report=stack.enter_context(store.open_folder(validated.report_digest)),
        )
        if (files.report / TEST_FILES).is_dir():
            files = replace(files, test_files=files.report / TEST_FILES)
        manifest = read_manifest(files.artifact)
        entry = VersionEntry(
            name=wanted,
            target=manifest.target.name,
            spec=manifest.spec.model_dump(mode="json"),
            source_uri=source.uri,
            source_revision=source.revision,
            source_digest=source.digest,
            artifact_uri=artifact.uri,
            artifact_digest=artifact.digest,
            verdict="warn" if validated.outcome == "warn" else "pass",
            figures=figures,
            report_uri=validated.report_uri,
            report_digest=validated.report_digest,
            flow_run_id=flow_run_id,
        )
        # Not every registry can refuse a second writer of one digest; every store can.
        lock = f"register/{registry_uri}/{wanted}/{artifact.digest}"
        stack.enter_context(store.lock(lock, on_wait=lambda: logger.info("another run registers it; waiting")))
        # An artifact that was found, not made, may be older than what a collection that runs now leaves alone.
        for folder in (files.artifact, files.report):
            store.put_folder(folder)
        return open_registry(registry_uri, settings).register(entry, files)


def check_verdict(validated: ValidatedArtifact, *, allow_warn: bool) -> None:
    """Refuse every verdict but pass, and warn where it is allowed.

    Raises:
        VerdictError: its message is the verdict's reason, in one line.
    """
    if validated.outcome == "warn" and not allow_warn:
        raise VerdictError(
            validated.reason,
            hint=f"Not registered. To register all the same, set allow_warn. Report: {validated.report_uri}",
        )
    if validated.outcome not in ("pass", "warn"):
        raise VerdictError(validated.reason, hint=f"Not registered. Report: {validated.report_uri}")


def find_version(
    source: FetchedSource, artifact: CompiledArtifact, *, name: str | None, registry_uri: str, settings: Settings
) -> ModelVersion | None:
    """Return the version that holds an artifact under a name already, or None; what a step that is off does."""
    wanted = name or default_name(source.uri)
    found = open_registry(registry_uri, settings).find(artifact.digest)
    return next((version for version in found if version.name == wanted), None)


def default_name(source_uri: str) -> str:
    """Make a registry name of the last part of a model's URI, or of its name in another registry.

    >>> default_name("hf://sentence-transformers/all-MiniLM-L6-v2")
    'all-MiniLM-L6-v2'
    >>> default_name("mlflow:http://host:5000#ner@3")
    'ner'
    """
    before, hash_sign, registered = source_uri.rpartition("#")
    if hash_sign and before.startswith("mlflow:"):
        source_uri = registered.partition("@")[0]
    last = source_uri.rstrip("/").rpartition("/")[2]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", last).lstrip("._-")
    return name[:128] or "model"
