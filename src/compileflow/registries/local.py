"""sqlite: the embedded model registry, one SQLite file that several processes may use at once."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path

from compileflow.errors import RegistryError, RegistryUnavailableError, SpecError
from compileflow.settings import Settings
from compileflow.versions import ModelVersion, VersionEntry
from compileflow.workspace import os_errors

_SCHEMA_VERSION = 1
_WAIT_S = 30.0
_SCHEMA = """
CREATE TABLE model(id INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL);
CREATE TABLE version(
    model_id INTEGER NOT NULL REFERENCES model(id),
    number INTEGER NOT NULL,
    artifact_digest TEXT NOT NULL,
    created_at TEXT NOT NULL,
    entry TEXT NOT NULL,
    PRIMARY KEY(model_id, number),
    UNIQUE(model_id, artifact_digest)
) WITHOUT ROWID;
CREATE INDEX version_by_digest ON version(artifact_digest);
"""
_SELECT = "SELECT v.number, v.created_at, v.entry FROM version v JOIN model m ON m.id = v.model_id "


class LocalRegistry:
    """Model versions in SQLite: a row is there whole or not at all, whoever is killed when."""

    def __init__(self, uri: str, settings: Settings):
        """Take the settings that every registry takes; a file needs none of them."""
        if not uri.startswith("sqlite:///"):
            raise SpecError(f"{uri!r} is no registry file.", hint="Write it as sqlite:////absolute/path.db.")
        self.uri = uri
        self._path = Path(uri.removeprefix("sqlite:///"))

    def register(self, entry: VersionEntry) -> ModelVersion:
        """Add a version, or return the one that holds this artifact under this name already."""
        with self._transaction() as db:
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
            row = (number, datetime.now(UTC).isoformat(timespec="seconds"), body)
            db.execute(
                "INSERT INTO version(model_id, number, artifact_digest, created_at, entry) VALUES (?, ?, ?, ?, ?)",
                (model_id, number, entry.artifact_digest, row[1], body),
            )
            return _version(row)

    def find(self, artifact_digest: str) -> Sequence[ModelVersion]:
        """Return every version of an artifact, newest first."""
        return self._read("WHERE v.artifact_digest = ?", artifact_digest)

    def get(self, name: str, version: int) -> ModelVersion:
        """Return one version.

        Raises:
            RegistryError: there is no such name or number; the hint lists what there is.
        """
        found = self.versions(name)
        for candidate in found:
            if candidate.version == version:
                return candidate
        numbers = ", ".join(str(candidate.version) for candidate in found)
        raise RegistryError(f"{name} has no version {version}.", hint=f"It has: {numbers}.")

    def versions(self, name: str | None = None) -> Sequence[ModelVersion]:
        """Return all versions of one name, or of all names, newest first.

        Raises:
            RegistryError: there is no such name; the hint lists near ones.
        """
        if name is None:
            return self._read("")
        found = sorted(self._read("WHERE m.name = ?", name), key=lambda one: one.version, reverse=True)
        if not found:
            names = sorted({version.name for version in self._read("")})
            near = get_close_matches(name, names, n=5, cutoff=0.4) or names[:10]
            raise RegistryError(
                f"The registry {self.uri} has no model {name!r}.",
                hint=f"Near names: {', '.join(near)}." if near else "It is empty; run the flow first.",
            )
        return found

    def _read(self, where: str, *values: str) -> list[ModelVersion]:
        if not self._path.exists():
            return []
        with self._connection() as db:
            query = _SELECT + where + " ORDER BY v.created_at DESC, m.name, v.number DESC"
            return [_version(row) for row in db.execute(query, values)]

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with os_errors(self._path, "write the registry", kind=RegistryError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._connection() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        try:
            db = sqlite3.connect(self._path, isolation_level=None, timeout=_WAIT_S)
        except sqlite3.Error as error:
            raise self._trouble(error) from error
        try:
            _use_wal(db)
            db.execute("PRAGMA synchronous = FULL")
            db.execute("PRAGMA foreign_keys = ON")
            self._migrate(db)
            yield db
        except sqlite3.Error as error:
            raise self._trouble(error) from error
        finally:
            db.close()

    def _migrate(self, db: sqlite3.Connection) -> None:
        if _schema_version(db) == 0:
            db.execute("BEGIN IMMEDIATE")
            if _schema_version(db) == 0:
                for statement in _SCHEMA.split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
            db.execute("COMMIT")
        elif _schema_version(db) != _SCHEMA_VERSION:
            raise RegistryError(
                f"{self._path} has registry schema {_schema_version(db)}; "
                f"this compileflow knows {_SCHEMA_VERSION}.",
                hint="Install the compileflow that made it.",
            )

    def _trouble(self, error: sqlite3.Error) -> RegistryError:
        text = f"The registry {self._path} failed: {error}."
        if "locked" in str(error) or "busy" in str(error):
            return RegistryUnavailableError(text, hint="Another process holds it; try again.")
        if "full" in str(error):
            return RegistryError(text, hint="Free some space on its disk, and run again.")
        return RegistryError(text, hint="Check that file and the rights on it.")


def _use_wal(db: sqlite3.Connection) -> None:
    """Switch to the write-ahead log. Here SQLite itself does not wait for other processes."""
    until = time.monotonic() + _WAIT_S
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(0.01)
        else:
            return


def _schema_version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def _version(row: tuple[int, str, str]) -> ModelVersion:
    number, created_at, entry = row
    return ModelVersion.model_validate(json.loads(entry) | {"version": number, "created_at": created_at})
