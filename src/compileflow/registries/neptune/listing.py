"""The versions in a Neptune project: complete ones only, without duplicates, in their effective stage."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from compileflow._process.folders import work_folder
from compileflow.contracts import STAGES, ModelVersion
from compileflow.contracts.json_files import MOST_JSON_BYTES, read_bytes
from compileflow.registries.lookup import choose_version, is_exclusive, unknown_name
from compileflow.registries.neptune import fields as layout
from compileflow.registries.neptune.calls import NeptuneClient
from compileflow.registries.neptune.client_session import Value
from compileflow.settings import Settings

logger = logging.getLogger(__name__)

# Comparisons in one query. A server may refuse long ones.
_MOST_DIGESTS = 100


@dataclass(frozen=True)
class Row:
    """A complete version in the state that Neptune lists.

    Attributes:
        identity: Neptune's id of the version.
        version: The version in Neptune's stage. After a kill two versions may be in an exclusive stage.
        promoted_at: Time of the last change of stage, UTC, ISO 8601; '' without a change.
    """

    identity: str
    version: ModelVersion
    promoted_at: str


class Listing:
    """Reads a project's versions; the server filters them."""

    def __init__(self, client: NeptuneClient, uri: str, settings: Settings):
        self._client = client
        self._uri = uri
        self._settings = settings

    def named(self, name: str) -> list[Row]:
        """Return a name's versions, oldest first."""
        rows = [row for row in self.rows(layout.equals(layout.NAME, name)) if row.version.name == name]
        if not rows:
            records = self._client.find("version", layout.IS_COMPLETE, [layout.NAME])
            raise unknown_name(self._uri, name, (str(record[layout.NAME]) for record in records))
        return rows

    def numbered(self, name: str, number: int) -> Row:
        """Return one version of a name.

        Raises:
            RegistryError: The name or the number does not exist; the hint lists those that do.
        """
        identity = f"{self._client.project_key()}-{layout.model_key(name)}-{number}"
        for row in self.rows(layout.equals("sys/id", identity)):
            if row.version.name == name:
                return row
        rows = self.named(name)
        chosen = choose_version(name, [row.version for row in reversed(rows)], number)
        return next(row for row in rows if row.version is chosen)

    def in_stage(self, names: Iterable[str], stages: Iterable[str]) -> list[Row]:
        """Return the versions of some names that Neptune lists in one of some stages."""
        return self.rows(
            layout.all_of(
                layout.any_of(layout.equals(layout.NAME, name) for name in sorted(set(names))),
                layout.any_of(layout.equals("sys/stage", stage) for stage in stages),
            )
        )

    def newest(self, query: str, limit: int) -> list[ModelVersion]:
        """Return the newest of the versions that match a query, newest first, in their effective stage."""
        query = layout.all_of(query, layout.IS_COMPLETE)
        records = self._client.find("version", query, [layout.DIGEST], newest=limit)
        identities = {str(record["sys/id"]) for record in records}
        digests = sorted({str(record[layout.DIGEST]) for record in records})
        rows: list[Row] = []
        for first in range(0, len(digests), _MOST_DIGESTS):
            # Repeated artifacts show only when all versions of an artifact are known.
            part = digests[first : first + _MOST_DIGESTS]
            rows += self.rows(layout.any_of(layout.equals(layout.DIGEST, digest) for digest in part))
        return self.settled(row for row in rows if row.identity in identities)

    def rows(self, query: str, *, duplicates: bool = False) -> list[Row]:
        """Return complete versions by model and number, with `duplicates` also repeated artifacts in a model."""
        records = self._client.find("version", layout.all_of(query, layout.IS_COMPLETE), layout.COLUMNS)
        records.sort(key=lambda record: _model_and_number(str(record["sys/id"])))
        rows: list[Row] = []
        keys: set[tuple[str, str]] = set()
        for record in records:
            identity = str(record["sys/id"])
            model = _model_and_number(identity)[0]
            key = (model, str(record[layout.DIGEST]))
            if key not in keys or duplicates:
                version = self._version(identity, record)
                if not model.endswith(f"-{layout.model_key(version.name)}"):
                    # Its number is one of another model's.
                    logger.warning("ignoring %s, which is not a version of the model %r", identity, version.name)
                    continue
                keys.add(key)
                rows.append(Row(identity, version, str(record[layout.PROMOTED_AT] or "")))
        return rows

    def _version(self, identity: str, record: dict[str, Value]) -> ModelVersion:
        text = record[layout.ENTRY_JSON]
        if text is None:
            # The entry is longer than a string that Neptune stores.
            with work_folder(self._settings.work_dir, label="entry") as work:
                self._client.download(identity, layout.ENTRY_FILE, work / "entry.json")
                self._client.release()
                # Other bytes are not JSON, which is said below.
                text = read_bytes(work / "entry.json", most_bytes=MOST_JSON_BYTES).decode("utf-8", "replace")
        return layout.to_version(
            identity, str(text), stage=str(record["sys/stage"]), created_at=str(record["sys/creation_time"])
        )

    def settled(self, rows: Iterable[Row]) -> list[ModelVersion]:
        """Return versions newest first in their effective stage, given some versions of their names."""
        versions = settle(rows)
        names = {version.name for version in versions if is_exclusive(version.stage)}
        candidates = self.in_stage(names, filter(is_exclusive, STAGES)) if names else []
        settled_versions = {(version.name, version.version): version for version in settle(candidates)}
        return [settled_versions.get((version.name, version.version), version) for version in versions]


def settle(rows: Iterable[Row]) -> list[ModelVersion]:
    """Return versions newest first; of two in one exclusive stage, only the last promoted one is in it."""
    rows = list(rows)
    newest_rows: dict[tuple[str, str], Row] = {}
    for row in sorted(rows, key=lambda row: row.promoted_at):
        newest_rows[(row.version.name, row.version.stage)] = row
    versions = [
        row.version
        if not is_exclusive(row.version.stage) or newest_rows[(row.version.name, row.version.stage)] is row
        else row.version.model_copy(update={"stage": "archived"})
        for row in rows
    ]
    return sorted(versions, key=lambda version: (version.created_at, version.version), reverse=True)


def _model_and_number(identity: str) -> tuple[str, int]:
    return identity.rpartition("-")[0], layout.number_of(identity)
