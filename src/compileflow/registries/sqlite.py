"""sqlite: the embedded model registry, one SQLite file that several processes may use at once."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from compileflow.contracts import ModelVersion, Promotion, Stage, VersionEntry, VersionFiles
from compileflow.errors import SpecError
from compileflow.registries.lookup import (
    check_stage,
    choose_version,
    is_exclusive,
    read_version,
    replaced_by,
    unknown_name,
)
from compileflow.registries.sqlite_file import reading, write_transaction
from compileflow.settings import Settings

_FROM = " FROM version v JOIN model m ON m.id = v.model_id "
_SELECT = "SELECT v.number, v.created_at, v.entry, v.stage" + _FROM
# Before schema 2 there were no stages; such a file may be one that nobody can migrate.
_SELECT_SCHEMA_1 = "SELECT v.number, v.created_at, v.entry, 'none'" + _FROM


class LocalRegistry:
    """Model versions in SQLite: a row is there whole or not at all, whoever is killed when."""

    def __init__(self, uri: str, settings: Settings):
        """Take the settings that every registry takes; a file needs none of them."""
        if not uri.startswith("sqlite:///"):
            raise SpecError(f"{uri!r} is no registry file.", hint="Write it as sqlite:////absolute/path.db.")
        self.uri = uri
        self._path = Path(uri.removeprefix("sqlite:///"))

    def register(self, entry: VersionEntry, files: VersionFiles | None = None) -> ModelVersion:
        """Add a version, or return the one that holds this artifact under this name already.

        Of `files` nothing is kept: the store has them.
        """
        with write_transaction(self._path) as db:
            db.execute("INSERT OR IGNORE INTO model(name) VALUES (?)", (entry.name,))
            (model_id,) = db.execute("SELECT id FROM model WHERE name = ?", (entry.name,)).fetchone()
            row = db.execute(
                _SELECT + "WHERE m.id = ? AND v.artifact_digest = ?", (model_id, entry.artifact_digest)
            ).fetchone()
            if row is not None:
                return _version(row)
            (number,) = db.execute(
                "SELECT COALESCE(MAX(number), 0) + 1 FROM version WHERE model_id = ?", (model_id,)
            ).fetchone()
            body = json.dumps(entry.model_dump(mode="json", include=set(VersionEntry.model_fields)))
            created_at = _now()
            db.execute(
                "INSERT INTO version(model_id, number, artifact_digest, created_at, entry) VALUES (?, ?, ?, ?, ?)",
                (model_id, number, entry.artifact_digest, created_at, body),
            )
            return _version((number, created_at, body, "none"))

    def find(self, artifact_digest: str) -> Sequence[ModelVersion]:
        """Return every version of an artifact, newest first."""
        return self._read("WHERE v.artifact_digest = ?", artifact_digest)

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
            return self._read("")
        found = sorted(self._read("WHERE m.name = ?", name), key=lambda one: one.version, reverse=True)
        if not found:
            raise unknown_name(self.uri, name, (version.name for version in self._read("")))
        return found

    def compiled_from(self, source_uri: str) -> Sequence[ModelVersion]:
        """Return every version that was compiled from that source model, newest first."""
        return [version for version in self._read("") if version.source_uri == source_uri]

    def set_stage(self, name: str, version: int, stage: Stage, *, who: str, reason: str = "") -> ModelVersion:
        """Move a version to a stage, and archive the one that was in staging or production before it.

        Raises:
            RegistryError: there is no such stage, name or number.
        """
        check_stage(stage)
        self.get(name, version)
        with write_transaction(self._path) as db:
            # Looked at again, now that nobody else can move one.
            rows = db.execute(_SELECT + "WHERE m.name = ? ORDER BY v.number DESC", (name,)).fetchall()
            found = [_version(row) for row in rows]
            mine = choose_version(name, found, version)
            if mine.stage != stage:
                for other in found:
                    if other.stage == stage and is_exclusive(stage):
                        _move(db, other, "archived", who, replaced_by(version, stage))
                _move(db, mine, stage, who, reason)
        return mine.model_copy(update={"stage": stage})

    def promotions(self, name: str, version: int) -> Sequence[Promotion]:
        """Return every change of a version's stage, oldest first.

        Raises:
            RegistryError: there is no such name or number.
        """
        self.get(name, version)
        with reading(self._path) as (db, schema):
            if schema < 2:
                return []
            rows = db.execute(
                "SELECT p.at, p.stage, p.who, p.reason FROM promotion p JOIN model m ON m.id = p.model_id"
                " WHERE m.name = ? AND p.number = ? ORDER BY p.id",
                (name, version),
            )
            return [Promotion(at=at, stage=stage, who=who, reason=reason) for at, stage, who, reason in rows]

    def _read(self, where: str, *values: str) -> list[ModelVersion]:
        if not self._path.exists():
            return []
        with reading(self._path) as (db, schema):
            if schema == 0:
                return []
            query = (_SELECT if schema >= 2 else _SELECT_SCHEMA_1) + where
            rows = db.execute(query + " ORDER BY v.created_at DESC, m.name, v.number DESC", values)
            return [_version(row) for row in rows]


def _move(db: sqlite3.Connection, version: ModelVersion, stage: Stage, who: str, reason: str) -> None:
    (model_id,) = db.execute("SELECT id FROM model WHERE name = ?", (version.name,)).fetchone()
    db.execute(
        "UPDATE version SET stage = ? WHERE model_id = ? AND number = ?", (stage, model_id, version.version)
    )
    db.execute(
        "INSERT INTO promotion(model_id, number, at, stage, who, reason) VALUES (?, ?, ?, ?, ?, ?)",
        (model_id, version.version, _now(), stage, who, reason),
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _version(row: tuple[int, str, str, Stage]) -> ModelVersion:
    number, created_at, entry, stage = row
    added = {"version": number, "created_at": created_at, "stage": stage}
    return read_version(entry, f"A version {number} of the registry's file", added)
