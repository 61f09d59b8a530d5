"""fetch: put a source model into the artifact store, pinned to a revision and complete."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from compileflow._process.folders import os_errors, work_folder
from compileflow.artifact.attestations.statements import Origin
from compileflow.catalog import get_source, open_store, resolve_reference
from compileflow.contracts import ArtifactStore, LocatedSource, ModelVersion, Source
from compileflow.contracts.digests import folder_digest, list_files
from compileflow.errors import ManifestError, SourceError, SpecError, StepOffError
from compileflow.settings import Settings
from compileflow.sources.files import check_files, read_errors
from compileflow.sources.registered_version import task_of
from compileflow.spec import HfTask
from compileflow.steps.attest import Attester
from compileflow.steps.cache import CacheKey, find, find_or_make, latest
from compileflow.steps.values import FetchedSource
from compileflow.stores.layout import split_uri

logger = logging.getLogger(__name__)
STEP = "fetch"
_BLOCK_BYTES = 1 << 20
_FOLDERS = {"digest": "stored_uri", "test_files_digest": ""}


def fetch_source(
    model: str,
    revision: str | None,
    *,
    store_uri: str,
    settings: Settings,
    enabled: bool = True,
    on_progress: Callable[[str], None] = logger.info,
) -> FetchedSource:
    """Put a source model's files into the store.

    A folder is hashed at each call, so that a model retrained in place counts as new; so is a registered version.
    A Hub model is downloaded once for each commit.

    Args:
        model: Folder, file:// URI, Hub id (owner/name), hf:// URI, or a registered version: neptune://, mlflow: or
            registry:.
        revision: Branch, tag or commit of a Hub model; None for the main branch.
        store_uri: URI of the artifact store.
        settings: Work folder, Hub endpoint and token.
        enabled: False reuses the last source model that the store has from `model`.
        on_progress: Called with one line for each stage.

    Raises:
        SourceError: The model does not exist, is incomplete, or changes while it is read.
        StepOffError: The step is off, and the store has no source model from `model`.
    """
    store = open_store(store_uri, settings)
    # A registry: source reads from this store, not from the configured one.
    source = get_source(scheme_of(model), settings.model_copy(update={"store_uri": store_uri}))
    attester = Attester.of(store, settings)
    if not enabled:
        return _reuse(source, model, revision, settings, attester)
    uri, commit = source.pin(model, revision)
    version = _checked_version(model, settings, attester) if scheme_of(model) == "registry" else None
    with work_folder(settings.work_dir, label="fetch") as work:
        if commit is None:
            located_source = source.locate(model, revision, work / "download")
            check_files(located_source.folder, located_source.files)
            with read_errors():
                files = list_files(located_source.folder, paths=located_source.files)
            parts = {"uri": uri} | {record.path: record.sha256 for record in files}
            key = CacheKey(STEP, uri, parts | _card_parts(located_source))
            pinned_revision = folder_digest(files)
            # A stage or an alias may mean another version by now, and a row may have changed since it was checked.
            if located_source.uri != uri:
                raise _changed(uri)
            located = (uri, located_source.revision, pinned_revision, located_source.hf_task)
            if version is not None and located != (
                version.source_uri,
                version.source_revision,
                version.source_digest,
                task_of(version),
            ):
                raise _changed(uri)
        else:
            located_source = None
            key = CacheKey(STEP, uri, {"uri": uri, "commit": commit})
            pinned_revision = commit

        def compute(reason: str) -> FetchedSource:
            on_progress(f"fetching {uri} at {pinned_revision[:12]}")
            model_files = located_source or source.locate(model, pinned_revision, work / "download")
            if located_source is None:
                check_files(model_files.folder, model_files.files)
            copy = work / "model"
            _copy_files(model_files, copy)
            if located_source is not None and folder_digest(list_files(copy)) != pinned_revision:
                raise _changed(uri)
            return _store_source(store, model_files, uri, model_files.revision or pinned_revision, copy)

        def reason_to_redo(value: FetchedSource) -> str:
            """A record that says something else than the files was not written by this step."""
            if located_source is None:
                return ""
            found = (value.digest, value.revision, value.hf_task, value.test_files_digest)
            expected = (pinned_revision, located_source.revision or pinned_revision, *_card(located_source))
            return "" if found == expected else "its record names other files"

        value, cached = find_or_make(
            store,
            key,
            FetchedSource,
            folders=_FOLDERS,
            attester=attester,
            compute=compute,
            report_line=on_progress,
            reason_to_redo=reason_to_redo,
        )
    return value.model_copy(update={"cached": cached})


def scheme_of(model: str) -> str:
    """Return the kind of source that `model` names: "file", "hf", "neptune", "mlflow" or "registry"."""
    scheme = model.partition(":")[0]
    if "://" in model or scheme in ("mlflow", "registry"):
        return scheme
    path = Path(model)
    # A Hub id has an owner and a name. Where a local file or folder has the owner's name, it is a path.
    is_local = model.startswith((".", "/", "~")) or model.count("/") != 1 or path.exists() or path.parent.exists()
    return "file" if is_local else "hf"


def _changed(uri: str) -> SourceError:
    return SourceError(
        f"{uri} changed while it was being read.", hint="Wait until nothing writes to it, and run this again."
    )


def _checked_version(model: str, settings: Settings, attester: Attester) -> ModelVersion:
    """Return the registered version that `model` names, if its artifact was compiled from its source model.

    Anyone who can write to a registry can put another source model into a version. The provenance of the version's
    artifact names the right one. Without a key, a version without provenance is believed.

    Raises:
        SourceError: The provenance names another source model; or the run has a key, and no trusted key signed it.
    """
    version = resolve_reference(model, settings)
    reason, origin = attester.compiled_from(version.artifact_digest)
    if origin is None:
        # The run's store may hold only the source model. A row need not name a store.
        with suppress(ManifestError, SpecError):
            other_store = open_store(split_uri(version.artifact_uri)[0], settings)
            reason, origin = replace(attester, store=other_store).compiled_from(version.artifact_digest)
    if origin is None and not attester.requires_signature:
        return version
    if origin is not None:
        reason = _contradiction(version, origin, attester)
    if reason:
        raise SourceError(
            f"The source model of {version.name} version {version.version} cannot be used: {reason}.",
            hint="Compile the model from its origin, and find out who changed the registry or the store.",
        )
    return version


def _contradiction(version: ModelVersion, origin: Origin, attester: Attester) -> str:
    """Return what a version says about its source model and the provenance of its artifact denies; or ''."""
    if origin.digest != version.source_digest:
        return (
            f"its artifact was compiled from {origin.digest[:12] or 'none'}, not from {version.source_digest[:12]}"
        )
    if (task := str(version.spec.get("hf_task", ""))) != origin.hf_task:
        return f"its artifact was compiled for {origin.hf_task or 'no task'}, not for {task or 'no task'}"
    place = origin.uri, origin.revision or version.source_revision
    named = version.source_uri, version.source_revision
    # An artifact may have been compiled from the same files elsewhere.
    recorded = recorded_source(attester.store, version.source_uri, origin.digest, attester)
    if named in (place, (recorded.uri, recorded.revision) if recorded else place):
        return ""
    return f"its artifact was compiled from {' at '.join(place)}, not from {' at '.join(named)}"


def _copy_files(located_source: LocatedSource, copy: Path) -> None:
    """Copy the files of the model only, so that the digest does not depend on other files of the folder."""
    with os_errors(copy, "write to"):
        for name in located_source.files:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            with read_errors():
                stream = (located_source.folder / name).open("rb")
            with stream, (copy / name).open("xb") as target:
                shutil.copyfileobj(stream, target, _BLOCK_BYTES)


def _store_source(
    store: ArtifactStore, located_source: LocatedSource, uri: str, revision: str, copy: Path
) -> FetchedSource:
    """Store the copied files, and the test files of a registered version."""
    stored_folder = store.put_folder(copy)
    return FetchedSource(
        uri=uri,
        revision=revision,
        stored_uri=stored_folder.uri,
        digest=stored_folder.digest,
        size_bytes=stored_folder.size_bytes,
        cached=False,
        hf_task=located_source.hf_task,
        test_files_digest=store.put_folder(located_source.test_files).digest
        if located_source.test_files
        else None,
    )


def _card_parts(located_source: LocatedSource) -> dict[str, str]:
    """Return the task and the test files of a registered version, as parts of the cache key."""
    parts = {"task": located_source.hf_task.value} if located_source.hf_task else {}
    if located_source.test_files is not None:
        parts |= {f"test file {record.path}": record.sha256 for record in list_files(located_source.test_files)}
    return parts


def _card(located_source: LocatedSource) -> tuple[HfTask | None, str | None]:
    """Return the task of a registered version, and the digest of its test files."""
    tests = located_source.test_files
    return located_source.hf_task, None if tests is None else folder_digest(list_files(tests))


def recorded_source(store: ArtifactStore, uri: str, digest: str, attester: Attester) -> FetchedSource | None:
    """Return the last source model that was fetched from a URI, if it has this digest; None without it."""
    value = _last(store, uri, attester)
    return value if value is not None and value.digest == digest else None


def _reuse(
    source: Source, model: str, revision: str | None, settings: Settings, attester: Attester
) -> FetchedSource:
    store = attester.store
    # The step is off: reuse the last commit without asking the Hub.
    scheme = scheme_of(model)
    uri = f"hf://{model.removeprefix('hf://')}" if scheme == "hf" else source.pin(model, revision)[0]
    if scheme == "registry":
        version = _checked_version(model, settings, attester)
        value = recorded_source(store, version.source_uri, version.source_digest, attester)
        update: dict[str, object] = {"hf_task": task_of(version), "revision": version.source_revision}
    else:
        value = _last(store, uri, attester)
        # A registered version that was compiled from the same place has a task, which is not the place's own.
        update = {"hf_task": None} if scheme in ("file", "hf") else {}
    if value is not None:
        return value.model_copy(update=update)
    raise StepOffError(
        f"The fetch step is off, and the store {store.uri} has no source model from {uri}.",
        hint="Switch the fetch step on.",
    )


def _last(store: ArtifactStore, uri: str, attester: Attester) -> FetchedSource | None:
    latest_record = latest(store, STEP, uri)
    parts = latest_record.get("parts") if latest_record else None
    # The record may be that of another model.
    if not isinstance(parts, dict) or parts.get("uri") != uri:
        return None
    key = CacheKey(STEP, uri, {name: str(value) for name, value in parts.items()})
    value = find(store, key, FetchedSource, folders=_FOLDERS, attester=attester)
    return None if value is None else value.model_copy(update={"cached": True})
