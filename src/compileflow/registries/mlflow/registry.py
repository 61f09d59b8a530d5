"""mlflow: a registry in MLflow: tags hold what is registered, aliases say which version is in which stage.

A version is made with all its tags in one request, so that it is there whole or not at all. Nothing in MLflow
keeps two callers from making two versions of one artifact: a lock keeps apart those of this machine; after making
one, a caller looks again, and the smallest number wins.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from compileflow._process.folders import file_lock, os_errors
from compileflow.contracts import ModelVersion, Promotion, Stage, VersionEntry, VersionFiles
from compileflow.errors import RegistryError, RegistryUnavailableError
from compileflow.registries.lookup import check_stage, choose_version, is_exclusive, replaced_by, unknown_name
from compileflow.registries.mlflow.client import error_code, parse_place
from compileflow.registries.mlflow.files import run_with_files
from compileflow.registries.mlflow.tags import (
    ALIASES,
    ARCHIVED,
    DIGEST,
    SCHEMA,
    SCHEMA_VERSION,
    SOURCE,
    entry_tags,
    promotion_tag,
    read_promotions,
    read_version,
    source_key,
)
from compileflow.settings import Settings

logger = logging.getLogger(__name__)

_PAGE = 500


@dataclass(frozen=True)
class _Held:
    """A version with the tags and aliases that MLflow holds of it."""

    version: ModelVersion
    tags: dict[str, str]
    aliases: frozenset[str]


class MlflowRegistry:
    """Model versions in MLflow's model registry, each with a run that holds its small files."""

    def __init__(self, uri: str, settings: Settings):
        """Read the URI; its credentials are kept apart from `uri`, which errors show."""
        self._place = parse_place(uri)
        self._settings = settings
        self.uri = self._place.uri

    def register(self, entry: VersionEntry, files: VersionFiles | None = None) -> ModelVersion:
        """Add a version, or return the one that holds this artifact under this name already.

        Raises:
            RegistryError: MLflow refused.
            RegistryUnavailableError: it did not answer.
        """
        with self._alone():
            found = self._of_artifact(entry)
            if not found:
                with self._calls(f"register {entry.name}") as client:
                    _make_model(client, entry.name)
                    run_id, source = run_with_files(client, self._place, entry, files, self._settings.work_dir)
                    client.create_model_version(
                        entry.name, source=source, run_id=run_id, tags=entry_tags(entry), await_creation_for=0
                    )
                found = self._of_artifact(entry)
            if not found:
                raise RegistryUnavailableError(
                    f"MLflow at {self.uri} does not list the version of {entry.name} that it just made.",
                    hint="Somebody may have deleted it; run again.",
                )
            self._delete(found[1:])
            return found[0].version

    def find(self, artifact_digest: str) -> Sequence[ModelVersion]:
        """Return every version of an artifact, newest first."""
        return self._versions(_tag_is(DIGEST, artifact_digest)) if "'" not in artifact_digest else []

    def get(self, name: str, version: int | str) -> ModelVersion:
        """Return one version, by its number or by the stage it is in.

        Raises:
            RegistryError: there is no such name, number or stage; the hint lists what there is.
        """
        return choose_version(name, self.versions(name), version)

    def versions(self, name: str | None = None) -> Sequence[ModelVersion]:
        """Return all versions of one name, or of all names, newest first.

        Raises:
            RegistryError: there is no such name; the hint lists near ones.
        """
        if name is None:
            return self._versions(_tag_is(SCHEMA, SCHEMA_VERSION))
        return [held.version for held in self._held_of(name)]

    def compiled_from(self, source_uri: str) -> Sequence[ModelVersion]:
        """Return every version that was compiled from that source model, newest first."""
        return self._versions(_tag_is(SOURCE, source_key(source_uri)))

    def set_stage(self, name: str, version: int, stage: Stage, *, who: str, reason: str = "") -> ModelVersion:
        """Move a version to a stage, and archive the one that was in staging or production before it.

        Who and why are written first and the alias is moved last: a call that was killed is completed by the next.

        Raises:
            RegistryError: there is no such stage, name or number.
        """
        check_stage(stage)
        with self._alone():
            held_of_name = self._held_of(name)
            chosen = choose_version(name, [held.version for held in held_of_name], version)
            mine = next(held for held in held_of_name if held.version == chosen)
            with self._calls(f"move {name} {version} to {stage}") as client:
                if chosen.stage != stage:
                    _note(client, mine, stage, who, reason)
                    for other in held_of_name:
                        if other.version.stage == stage and is_exclusive(stage):
                            _note(client, other, "archived", who, replaced_by(version, stage))
                            client.set_model_version_tag(name, str(other.version.version), ARCHIVED, "true")
                    _move(client, mine, stage)
        return chosen.model_copy(update={"stage": stage})

    def promotions(self, name: str, version: int) -> Sequence[Promotion]:
        """Return every change of a version's stage, oldest first.

        Raises:
            RegistryError: there is no such name or number.
        """
        held_of_name = self._held_of(name)
        chosen = choose_version(name, [held.version for held in held_of_name], version)
        return next(read_promotions(held.tags) for held in held_of_name if held.version == chosen)

    def _held_of(self, name: str) -> list[_Held]:
        # Nothing with a quote can have been registered, and it would end the filter's string.
        found = _first_of_each_artifact(self._search(f"name = '{name}'")) if "'" not in name else []
        if not found:
            raise unknown_name(self.uri, name, (version.name for version in self.versions()))
        return sorted(found, key=lambda held: -held.version.version)

    def _of_artifact(self, entry: VersionEntry) -> list[_Held]:
        """Return all versions of a name with one artifact, smallest number first; more than one only by a race."""
        found = self._search(f"name = '{entry.name}' and {_tag_is(DIGEST, entry.artifact_digest)}")
        return sorted(found, key=lambda held: held.version.version)

    def _versions(self, query: str) -> list[ModelVersion]:
        found = [held.version for held in _first_of_each_artifact(self._search(query))]
        return sorted(found, key=lambda one: (one.created_at, one.version), reverse=True)

    def _search(self, query: str) -> list[_Held]:
        if self._place.file is not None and not self._place.file.exists():
            return []
        with self._calls("list versions") as client:
            rows = list(_pages(client.search_model_versions, query))
            aliases = _aliases(client, {row.name for row in rows})
        found = []
        for row in rows:
            mine = aliases.get((row.name, int(row.version)), frozenset())
            version = read_version(row.name, int(row.version), row.creation_timestamp, row.tags, aliases=mine)
            # A model of that name may hold versions that others registered.
            if version is not None:
                found.append(_Held(version, dict(row.tags), mine))
        return found

    def _delete(self, extra: Sequence[_Held]) -> None:
        for held in extra:
            name, number = held.version.name, held.version.version
            logger.warning("%s %d holds an artifact that is registered already; it is deleted", name, number)
            try:
                with self._calls(f"delete {name} {number}") as client:
                    client.delete_model_version(name, str(number))
            except RegistryError as error:
                if error_code(error.__cause__) != "RESOURCE_DOES_NOT_EXIST":
                    raise

    def _calls(self, doing: str) -> AbstractContextManager[Any]:
        return self._place.calls(doing, refused=RegistryError, unavailable=RegistryUnavailableError)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep out the others on this machine; where MLflow is a file, make its folder."""
        key = hashlib.sha256(self.uri.encode()).hexdigest()[:32]
        with file_lock(
            self._settings.home_dir / "locks" / f"mlflow-{key}.lock",
            on_wait=lambda: logger.info("waiting for another process that writes to %s", self.uri),
            poll_s=0.02,
        ):
            if self._place.file is not None:
                with os_errors(self._place.file, "write the registry", kind=RegistryError):
                    self._place.file.parent.mkdir(parents=True, exist_ok=True)
            yield


def _pages(search: Any, query: str) -> Iterator[Any]:
    token = None
    while True:
        page = search(query, max_results=_PAGE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _aliases(client: Any, names: set[str]) -> dict[tuple[str, int], frozenset[str]]:
    """Return the aliases of each version of these names; a version that MLflow lists does not tell its own."""
    if not names:
        return {}
    models = (
        [client.get_registered_model(next(iter(names)))]
        if len(names) == 1
        else _pages(client.search_registered_models, "")
    )
    found: dict[tuple[str, int], frozenset[str]] = {}
    for model in models:
        for alias, number in model.aliases.items():
            key = (model.name, int(number))
            found[key] = found.get(key, frozenset()) | {alias}
    return found


def _first_of_each_artifact(found: Sequence[_Held]) -> list[_Held]:
    first: dict[tuple[str, str], _Held] = {}
    for held in sorted(found, key=lambda one: one.version.version):
        first.setdefault((held.version.name, held.version.artifact_digest), held)
    return list(first.values())


def _make_model(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error_code(error) != "RESOURCE_ALREADY_EXISTS":
            raise


def _note(client: Any, held: _Held, stage: Stage, who: str, reason: str) -> None:
    """Write down a promotion, unless a call that was killed wrote the same one last."""
    last = read_promotions(held.tags)[-1:]
    if [(one.stage, one.who, one.reason) for one in last] != [(stage, who, reason)]:
        key, value = promotion_tag(stage, who, reason)
        client.set_model_version_tag(held.version.name, str(held.version.version), key, value)


def _move(client: Any, held: _Held, stage: Stage) -> None:
    name, number = held.version.name, str(held.version.version)
    if stage == "archived":
        client.set_model_version_tag(name, number, ARCHIVED, "true")
    if stage in ALIASES:
        client.set_registered_model_alias(name, stage, number)
    for alias in ALIASES:
        if alias != stage and alias in held.aliases:
            client.delete_registered_model_alias(name, alias)
    if stage != "archived" and ARCHIVED in held.tags:
        client.delete_model_version_tag(name, number, ARCHIVED)


def _tag_is(key: str, value: str) -> str:
    return f"tags.`{key}` = '{value}'"
