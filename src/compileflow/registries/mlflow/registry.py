"""mlflow: a registry in MLflow, where tags hold the entries and aliases the stages of versions.

One request creates a version with all its tags, so that it is complete or absent. MLflow lets two callers create
two versions of one artifact. Therefore a lock separates the callers of this machine, and after a creation a caller
searches again: the smallest number wins.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

from compileflow._process.folders import file_lock, os_errors
from compileflow.contracts import ModelVersion, Promotion, Stage, VersionEntry, VersionFiles
from compileflow.errors import RegistryError, RegistryUnavailableError
from compileflow.registries.lookup import check_stage, choose_version, replaced_by, unknown_name
from compileflow.registries.mlflow.client import PAGE, error_code, pages, parse_place
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
# MLflow reads the newest versions of each model that it lists, so asking for a few by name is faster.
_FEW_NAMES = 50


@dataclass(frozen=True)
class _Record:
    """A version with its tags and aliases in MLflow."""

    version: ModelVersion
    tags: dict[str, str]
    aliases: frozenset[str]


class MlflowRegistry:
    """Model versions in MLflow's model registry, each with a run that holds its small files."""

    def __init__(self, uri: str, settings: Settings):
        """Read the URI; `uri`, which errors show, omits its credentials."""
        self._place = parse_place(uri)
        self._settings = settings
        self.uri = self._place.uri

    def register(self, entry: VersionEntry, files: VersionFiles | None = None) -> ModelVersion:
        """Add a version, or return the one that already holds this artifact under this name.

        Raises:
            RegistryError: MLflow refused.
            RegistryUnavailableError: MLflow did not answer.
        """
        with self._alone():
            records = self._records_of_artifact(entry)
            if not records:
                with self._calls(f"register {entry.name}") as client:
                    _make_model(client, entry.name)
                    run_id, source = run_with_files(client, self._place, entry, files, self._settings.work_dir)
                    client.create_model_version(
                        entry.name, source=source, run_id=run_id, tags=entry_tags(entry), await_creation_for=0
                    )
                records = self._records_of_artifact(entry)
            if not records:
                raise RegistryUnavailableError(
                    f"MLflow at {self.uri} does not list the version of {entry.name} that it just created.",
                    hint="Another user may have deleted it; run again.",
                )
            self._delete(records[1:])
            return records[0].version

    def find(self, artifact_digest: str) -> Sequence[ModelVersion]:
        """Return every version of an artifact, newest first."""
        return self._versions(_tag_is(DIGEST, artifact_digest)) if "'" not in artifact_digest else []

    def get(self, name: str, version: int | str) -> ModelVersion:
        """Return one version by its number or its stage.

        Raises:
            RegistryError: The name, number or stage does not exist; the hint lists those that do.
        """
        record = self._numbered(name, version) if isinstance(version, int) else self._in_stage(name, version)
        return record.version if record else choose_version(name, self.versions(name), version)

    def versions(self, name: str | None = None, *, limit: int | None = None) -> Sequence[ModelVersion]:
        """Return all versions of one name, or of all names, newest first, or the newest ones only.

        Raises:
            RegistryError: The name does not exist; the hint lists similar names.
        """
        if name is None:
            return self._versions(_tag_is(SCHEMA, SCHEMA_VERSION), limit)
        return [record.version for record in self._records_of(name, limit)]

    def compiled_from(self, source_uri: str) -> Sequence[ModelVersion]:
        """Return every version that was compiled from that source model, newest first."""
        return self._versions(_tag_is(SOURCE, source_key(source_uri)))

    def set_stage(self, name: str, version: int, stage: Stage, *, who: str, reason: str = "") -> ModelVersion:
        """Move a version to a stage, and archive the version that it replaces in staging or production.

        The promotion is recorded first and the alias moves last, so that the next call completes a killed one.

        Raises:
            RegistryError: The stage, name or number does not exist.
        """
        check_stage(stage)
        with self._alone():
            chosen = self._record(name, version)
            if chosen.version.stage == stage:
                return chosen.version
            replaced = self._in_stage(name, stage)
            with self._calls(f"move {name} {version} to {stage}") as client:
                _record_promotion(client, chosen, stage, who, reason)
                if replaced is not None:
                    _record_promotion(client, replaced, "archived", who, replaced_by(version, stage))
                    client.set_model_version_tag(name, str(replaced.version.version), ARCHIVED, "true")
                _move(client, chosen, stage)
        return chosen.version.model_copy(update={"stage": stage})

    def note(self, name: str, version: int, *, who: str, reason: str) -> Promotion:
        """Record a note on a version, which stays in its stage.

        Raises:
            RegistryError: The name or number does not exist.
        """
        chosen = self.get(name, version)
        key, value = promotion_tag(chosen.stage, who, reason)
        with self._calls(f"write a note on {name} {version}") as client:
            client.set_model_version_tag(name, str(version), key, value)
        return Promotion.model_validate_json(value)

    def promotions(self, name: str, version: int) -> Sequence[Promotion]:
        """Return every change of a version's stage and every note on it, oldest first.

        Raises:
            RegistryError: The name or number does not exist.
        """
        return read_promotions(self._record(name, version).tags)

    def _record(self, name: str, version: int) -> _Record:
        """Return one version with its tags and aliases.

        Raises:
            RegistryError: The name or number does not exist.
        """
        record = self._numbered(name, version)
        if record is None:
            records = self._records_of(name)
            chosen = choose_version(name, [record.version for record in records], version)
            record = next(record for record in records if record.version == chosen)
        return record

    def _numbered(self, name: str, number: int) -> _Record | None:
        """Return the version of that number, None if compileflow registered none."""
        return self._read(lambda client: client.get_model_version(name, str(number)))

    def _in_stage(self, name: str, stage: str) -> _Record | None:
        """Return the version in a stage that has an alias, None if there is none."""
        if stage not in ALIASES:
            return None
        record = self._read(lambda client: client.get_model_version_by_alias(name, stage))
        return record if record is not None and record.version.stage == stage else None

    def _read(self, get: Callable[[Any], Any]) -> _Record | None:
        if self._place.file is not None and not self._place.file.exists():
            return None
        try:
            with self._calls("read a version") as client:
                row = get(client)
        except RegistryError as error:
            if error_code(error.__cause__) not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            return None
        return _as_record(row, frozenset(row.aliases))

    def _records_of(self, name: str, limit: int | None = None) -> list[_Record]:
        """Return the versions of a name, largest number first, or only those of the largest numbers."""
        # A registered name cannot contain a quotation mark, which would end the filter's string.
        # A condition on a tag would make MLflow look at the versions of all names.
        query, order = f"name = '{name}'", ("version_number DESC",)
        records = _first_of_each_artifact(self._search(query, limit, order)) if "'" not in name else []
        if not records:
            raise unknown_name(self.uri, name, (version.name for version in self.versions()))
        return sorted(records, key=lambda record: -record.version.version)

    def _records_of_artifact(self, entry: VersionEntry) -> list[_Record]:
        """Return all versions of a name with one artifact, smallest number first; only a race makes several."""
        records = self._search(f"name = '{entry.name}' and {_tag_is(DIGEST, entry.artifact_digest)}")
        return sorted(records, key=lambda record: record.version.version)

    def _versions(self, query: str, limit: int | None = None) -> list[ModelVersion]:
        order = ("creation_timestamp DESC",)
        versions = [record.version for record in _first_of_each_artifact(self._search(query, limit, order))]
        return sorted(versions, key=lambda version: (version.created_at, version.version), reverse=True)

    def _search(self, query: str, limit: int | None = None, order: Sequence[str] = ()) -> list[_Record]:
        if limit == 0 or (self._place.file is not None and not self._place.file.exists()):
            return []
        page = {} if limit is None else {"max_results": min(limit, PAGE)}
        with self._calls("list versions") as client:
            found = pages(client.search_model_versions, query, order_by=list(order), **page)
            # A model may also hold versions that compileflow did not register.
            rows = list(islice((row for row in found if row.tags.get(SCHEMA) == SCHEMA_VERSION), limit))
            aliases = _aliases(client, {row.name for row in rows})
        records = (_as_record(row, aliases.get((row.name, int(row.version)), frozenset())) for row in rows)
        return [record for record in records if record is not None]

    def _delete(self, records: Sequence[_Record]) -> None:
        for record in records:
            name, number = record.version.name, record.version.version
            logger.warning("Deleting %s %d, which repeats a registered artifact", name, number)
            try:
                with self._calls(f"delete {name} {number}") as client:
                    client.delete_model_version(name, str(number))
            except RegistryError as error:
                if error_code(error.__cause__) != "RESOURCE_DOES_NOT_EXIST":
                    raise

    def _calls(self, action: str) -> AbstractContextManager[Any]:
        return self._place.calls(action, refused=RegistryError, unavailable=RegistryUnavailableError)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Lock out other processes of this machine; if MLflow is a file, create its folder."""
        key = hashlib.sha256(self.uri.encode()).hexdigest()[:32]
        with file_lock(
            self._settings.home_dir / "locks" / f"mlflow-{key}.lock",
            on_wait=lambda: logger.info("Another process writes to %s; waiting", self.uri),
            poll_s=0.02,
        ):
            if self._place.file is not None:
                with os_errors(self._place.file, "write the registry", kind=RegistryError):
                    self._place.file.parent.mkdir(parents=True, exist_ok=True)
            yield


def _as_record(row: Any, aliases: frozenset[str]) -> _Record | None:
    """Return a version of MLflow's, None if compileflow did not register it."""
    version = read_version(row.name, int(row.version), row.creation_timestamp, row.tags, aliases=aliases)
    return None if version is None else _Record(version, dict(row.tags), aliases)


def _aliases(client: Any, names: set[str]) -> dict[tuple[str, int], frozenset[str]]:
    """Return the aliases of each version of these names; MLflow's list of versions omits them."""
    if not names:
        return {}
    models = (
        [client.get_registered_model(name) for name in sorted(names)]
        if len(names) <= _FEW_NAMES
        else pages(client.search_registered_models, "")
    )
    aliases: dict[tuple[str, int], frozenset[str]] = {}
    for model in models:
        for alias, number in model.aliases.items():
            key = (model.name, int(number))
            aliases[key] = aliases.get(key, frozenset()) | {alias}
    return aliases


def _first_of_each_artifact(records: Sequence[_Record]) -> list[_Record]:
    first_records: dict[tuple[str, str], _Record] = {}
    for record in sorted(records, key=lambda record: record.version.version):
        first_records.setdefault((record.version.name, record.version.artifact_digest), record)
    return list(first_records.values())


def _make_model(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error_code(error) != "RESOURCE_ALREADY_EXISTS":
            raise


def _record_promotion(client: Any, record: _Record, stage: Stage, who: str, reason: str) -> None:
    """Record a promotion, unless a killed call has recorded the same one last."""
    last_promotions = read_promotions(record.tags)[-1:]
    if [(promotion.stage, promotion.who, promotion.reason) for promotion in last_promotions] != [
        (stage, who, reason)
    ]:
        key, value = promotion_tag(stage, who, reason)
        client.set_model_version_tag(record.version.name, str(record.version.version), key, value)


def _move(client: Any, record: _Record, stage: Stage) -> None:
    name, number = record.version.name, str(record.version.version)
    if stage == "archived":
        client.set_model_version_tag(name, number, ARCHIVED, "true")
    if stage in ALIASES:
        client.set_registered_model_alias(name, stage, number)
    for alias in ALIASES:
        if alias != stage and alias in record.aliases:
            client.delete_registered_model_alias(name, alias)
    if stage != "archived" and ARCHIVED in record.tags:
        client.delete_model_version_tag(name, number, ARCHIVED)


def _tag_is(key: str, value: str) -> str:
    return f"tags.`{key}` = '{value}'"
