"""registry: the source model of a registered version, with its files from the artifact store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from compileflow.contracts import ArtifactStore, LocatedSource, ModelVersion
from compileflow.errors import IntegrityError, ManifestError, SourceError, SpecError
from compileflow.settings import Settings
from compileflow.spec import HfTask
from compileflow.stores.layout import split_uri


class RegisteredVersionSource:
    """Fetches the unchanged source model of a version, so that a new compile has the same lineage.

    Args:
        settings: URI of the configured store.
        resolve_reference: Finds the version of a reference; the catalog above this package provides it.
        open_store: Opens the store of a URI; the catalog provides it.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        resolve_reference: Callable[[str, Settings], ModelVersion],
        open_store: Callable[[str, Settings], ArtifactStore],
    ):
        self._settings = settings
        self._resolve_reference = resolve_reference
        self._open_store = open_store

    def pin(self, location: str, revision: str | None) -> tuple[str, str | None]:
        """Return the original URI of the source model, without a commit: the files come from the store.

        Raises:
            SourceError: A revision was given.
            RegistryError: The version does not exist.
        """
        return self._version(location, revision).source_uri, None

    def locate(self, location: str, revision: str | None, work_dir: Path) -> LocatedSource:
        """Fetch the source model from the store to `work_dir`, with its original URI and revision.

        Raises:
            SourceError: The store does not hold the complete source model, or a revision was given.
            RegistryError: The version does not exist.
        """
        version = self._version(location, revision)
        store = self._store(version)
        folder = work_dir / "source"
        try:
            records = store.get_folder(version.source_digest, folder)
        except IntegrityError as error:
            raise SourceError(
                f"The source model of {version.name} {version.version} is not complete in the store {store.uri}: "
                f"{error.message}",
                hint=f"Compile it from its origin: {version.source_uri}",
            ) from error
        return LocatedSource(
            uri=version.source_uri,
            revision=version.source_revision,
            folder=folder,
            files=tuple(record.path for record in records),
            hf_task=task_of(version),
        )

    def _store(self, version: ModelVersion) -> ArtifactStore:
        """Open the configured store or, if that lacks the source model, the store of the artifact."""
        store = self._open_store(self._settings.resolved_store_uri(), self._settings)
        if store.exists(version.source_digest):
            return store
        try:
            return self._open_store(split_uri(version.artifact_uri)[0], self._settings)
        except (ManifestError, SpecError):
            return store

    def _version(self, location: str, revision: str | None) -> ModelVersion:
        if revision is not None:
            raise SourceError(
                f"{location} is a registered version, and has no revision {revision!r}.",
                hint="Leave the revision empty, and write the number or the stage after an @.",
            )
        try:
            return self._resolve_reference(location, self._settings)
        except SpecError as error:
            raise SourceError(error.message, hint=error.hint) from error


def task_of(version: ModelVersion) -> HfTask | None:
    """Return the task of the version's spec, None without one."""
    try:
        return HfTask(str(version.spec.get("hf_task")))
    except ValueError:
        return None
