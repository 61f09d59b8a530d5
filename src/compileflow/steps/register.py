"""register: make a proven artifact a version in the model registry; refuse any other artifact."""

from __future__ import annotations

import logging
import re
from contextlib import ExitStack
from dataclasses import replace

from compileflow._process.folders import path_of_uri
from compileflow.artifact.attestations.statements import RESULT_OF
from compileflow.artifact.manifest import read_manifest
from compileflow.artifact.verify import contradictions, last_result
from compileflow.catalog import open_registry, open_store
from compileflow.contracts import (
    ACCEPTED_OUTCOMES,
    PENDING,
    ArtifactStore,
    ModelVersion,
    VersionEntry,
    VersionFiles,
)
from compileflow.errors import IntegrityError, VerdictError
from compileflow.settings import Settings
from compileflow.steps.values import CompiledArtifact, FetchedSource, ValidatedArtifact, all_figures
from compileflow.validation.report import TEST_FILES_FOLDER

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
    """Register an artifact in one registry.

    Registering the same artifact under the same name again returns the same version.

    Raises:
        VerdictError: The report is about another artifact, its verdict does not allow registration, the artifact
            was compiled from another source model, or its last signed verdict is FAILED.
        RegistryError: The registry refused.
        IntegrityError: The registry has a version of this artifact that says something else about it.
    """
    if validated.artifact_digest != artifact.digest:
        raise VerdictError(
            f"Expected a report about artifact {artifact.digest[:12]}..., got one about "
            f"{validated.artifact_digest[:12]}...",
            hint="Validate this artifact.",
        )
    check_verdict(validated, allow_warn=allow_warn)
    store = open_store(store_uri, settings)
    registered_name = name or default_name(source.uri)
    with ExitStack() as stack:
        files = VersionFiles(
            artifact=stack.enter_context(store.open_folder(artifact.digest)),
            report=stack.enter_context(store.open_folder(validated.report_digest)),
        )
        if (files.report / TEST_FILES_FOLDER).is_dir():
            files = replace(files, test_files=files.report / TEST_FILES_FOLDER)
        manifest = read_manifest(files.artifact)
        if manifest.source.digest != source.digest:
            raise VerdictError(
                f"The artifact was compiled from the source model {manifest.source.digest[:12]}..., "
                f"and not from {source.digest[:12]}...",
                hint="Compile this source model.",
            )
        entry = VersionEntry(
            name=registered_name,
            target=manifest.target.name,
            spec=manifest.spec.model_dump(mode="json"),
            source_uri=source.uri,
            source_revision=source.revision,
            source_digest=source.digest,
            artifact_uri=artifact.uri,
            artifact_digest=artifact.digest,
            verdict="warn" if validated.outcome == "warn" else "pass",
            figures=all_figures(artifact, validated),
            report_uri=validated.report_uri,
            report_digest=validated.report_digest,
            flow_run_id=flow_run_id,
        )
        # Not every registry can refuse a second writer of one digest, but every store has locks.
        lock = f"register/{registry_uri}/{registered_name}/{artifact.digest}"
        stack.enter_context(
            store.lock(
                lock, on_wait=lambda: logger.info("another run is registering this artifact; waiting for it")
            )
        )
        # After the wait, which may have been long.
        check_last_verdict(artifact, settings, allow_warn=allow_warn)
        # A cached artifact may be so old that a garbage collection deletes it now: storing it again renews it.
        for folder in (files.artifact, files.report):
            store.put_folder(folder)
        version = open_registry(registry_uri, settings).register(entry, files)
        for contradiction in contradictions(version, artifact.digest, manifest):
            raise IntegrityError(contradiction)
        if version.report_digest != entry.report_digest:
            _keep_report(store, version, last_uri=entry.report_uri)
        return version


def _keep_report(store: ArtifactStore, version: ModelVersion, *, last_uri: str) -> None:
    """Store the report of a version that is older than this run again, if its bytes can be had."""
    try:
        with store.open_folder(version.report_digest) as report:
            store.put_folder(report)
    except IntegrityError as error:
        # A report holds times, so a validation cannot write the same one.
        logger.warning(
            "%s version %d stays, but the store has lost the report %s that it names: %s The last report is %s",
            version.name,
            version.version,
            version.report_digest[:12],
            error.message,
            last_uri,
        )


def check_verdict(validated: ValidatedArtifact, *, allow_warn: bool) -> None:
    """Check that a verdict allows registration: pass, or warn with `allow_warn`.

    Raises:
        VerdictError: The verdict does not allow it.
    """
    if validated.outcome == "warn" and not allow_warn:
        raise VerdictError(
            f"The verdict is {validated.reason}.",
            hint="The artifact is not registered. To register it anyway, set allow_warn. "
            f"Report: {validated.report_uri}",
            report_uri=validated.report_uri,
        )
    if validated.outcome == PENDING:
        raise VerdictError(
            f"{validated.reason}.",
            hint="The artifact is stored, but not registered. On a machine with the device, run: "
            f"compileflow settle {validated.artifact_digest}",
            report_uri=validated.report_uri,
        )
    if validated.outcome not in ACCEPTED_OUTCOMES:
        raise VerdictError(
            f"The verdict is {validated.reason}.",
            hint=f"The artifact is not registered. Report: {validated.report_uri}",
            report_uri=validated.report_uri,
        )


def check_last_verdict(artifact: CompiledArtifact, settings: Settings, *, allow_warn: bool) -> None:
    """Check that the store has no other verdict on an artifact than a run wants, which it could not replace.

    Raises:
        VerdictError: The last verdict is FAILED, or WARNED without `allow_warn`.
    """
    last = last_result(artifact.uri, settings)
    if last not in (None, RESULT_OF["pass"], RESULT_OF["warn"] if allow_warn else None):
        raise VerdictError(
            f"The last verdict on the artifact {artifact.digest[:12]} is {last}, and this run cannot replace it, "
            "because it is signed.",
            hint="Compile the model again with COMPILEFLOW_SIGNING_KEY set.",
        )


def find_version(
    source: FetchedSource, artifact: CompiledArtifact, *, name: str | None, registry_uri: str, settings: Settings
) -> ModelVersion | None:
    """Return the version that already holds an artifact under a name, or None; used when the step is off."""
    registered_name = name or default_name(source.uri)
    versions = open_registry(registry_uri, settings).find(artifact.digest)
    return next((version for version in versions if version.name == registered_name), None)


def default_name(source_uri: str) -> str:
    """Return the default name of a model: the last part of its URI, or its name in another registry.

    >>> default_name("hf://sentence-transformers/all-MiniLM-L6-v2")
    'all-MiniLM-L6-v2'
    >>> default_name("file:///srv/my%20model")
    'my-model'
    >>> default_name("file:///srv/SmolLM2.Q4_1.gguf")
    'SmolLM2.Q4_1'
    >>> default_name("mlflow:http://host:5000#ner@3")
    'ner'
    """
    tracking_uri, hash_sign, reference = source_uri.rpartition("#")
    if hash_sign and tracking_uri.startswith("mlflow:"):
        source_uri = reference.partition("@")[0]
    path = str(path_of_uri(source_uri)).removesuffix(".gguf") if source_uri.startswith("file:") else source_uri
    last_part = path.rstrip("/").rpartition("/")[2]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", last_part).lstrip("._-")
    return name[:128] or "model"
