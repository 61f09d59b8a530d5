"""sqlite: the embedded model registry, one SQLite file that several processes may use at once."""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from compileflow._process.folders import check_writable, os_errors
from compileflow.contracts import ModelVersion, Promotion, Stage, VersionEntry, VersionFiles
from compileflow.errors import RegistryError, RegistryUnavailableError, SpecError
from compileflow.registries.lookup import (
    check_stage,
    choose_version,
    is_exclusive,
    read_promotion,
    read_version,
    replaced_by,
    unknown_name,
)
from compileflow.settings import Settings

SCHEMA_VERSION = 2
# Migrations from each schema to the next. A new file runs all of them: one path to the newest.
_MIGRATIONS = (
    """
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
CREATE INDEX version_by_digest ON version(artifact_digest)
""",
    """
ALTER TABLE version ADD COLUMN stage TEXT NOT NULL DEFAULT 'none'
    CHECK(stage IN ('none', 'staging', 'production', 'archived'));
CREATE UNIQUE INDEX one_version_in_a_stage ON version(model_id, stage) WHERE stage IN ('staging', 'production');
CREATE TABLE promotion(
    id INTEGER PRIMARY KEY,
    model_id INTEGER NOT NULL,
    number INTEGER NOT NULL,
    at TEXT NOT NULL,
    stage TEXT NOT NULL,
    who TEXT NOT NULL,
    reason TEXT NOT NULL,
    FOREIGN KEY(model_id, number) REFERENCES version(model_id, number)
);
CREATE INDEX promotion_by_version ON promotion(model_id, number)
""",
)
_BY_TIME = "CREATE INDEX IF NOT EXISTS version_by_time ON version(created_at)"
# All but SQLite's own.
_OBJECTS = "SELECT type, name, sql FROM sqlite_schema WHERE sql IS NOT NULL AND name NOT GLOB 'sqlite_*'"
_FROM = " FROM version v JOIN model m ON m.id = v.model_id "
_SELECT = "SELECT m.name, v.number, v.created_at, v.entry, v.stage" + _FROM
_WAIT_S = 30.0
# How long another process may take to make the file.
_MAKING_S = 5.0
_MOST_ROW_BYTES = 16 * 2**20
_CANNOT_WRITE = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)


class SqliteRegistry:
    """Model versions in SQLite: a row is complete or absent, even when its writer is killed."""

    def __init__(self, uri: str, settings: Settings):
        """Read the URI. Every registry takes the settings; this one needs none of them."""
        # A relative path would be another file in each working folder.
        if not uri.startswith("sqlite:////"):
            raise SpecError(
                f"Expected the URI of a registry file, got {uri!r}.",
                hint="Write it as sqlite:////absolute/path.db.",
            )
        self.uri = uri
        self._path = Path(uri.removeprefix("sqlite:///"))

    def check_writable(self) -> None:
        """Check that the file can be written or made, without making it.

        Raises:
            RegistryError: It cannot be written, or is not the file of a registry.
            RegistryUnavailableError: Another process holds the file for too long.
        """
        with os_errors(self._path, "write the registry", kind=RegistryError):
            if self._path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            check_writable(self._path.parent)
            if self._path.exists() and not os.access(self._path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        self.find("")

    def register(self, entry: VersionEntry, files: VersionFiles | None = None) -> ModelVersion:
        """Add a version, or return the one that already holds this artifact under this name.

        The registry keeps no copy of `files`: the store has them.
        """
        with _write_transaction(self._path) as db:
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
            return _version((entry.name, number, created_at, body, "none"))

    def find(self, artifact_digest: str) -> Sequence[ModelVersion]:
        """Return every version of an artifact, newest first."""
        return self._read("WHERE v.artifact_digest = ?", artifact_digest)

    def get(self, name: str, version: int | str) -> ModelVersion:
        """Return one version by its number or its stage.

        Raises:
            RegistryError: The name, number or stage does not exist; the hint lists those that do.
        """
        column = "v.number" if isinstance(version, int) else "v.stage"
        found = self._read(f"WHERE m.name = ? AND {column} = ?", name, version, limit=1)
        return found[0] if found else choose_version(name, self.versions(name), version)

    def versions(self, name: str | None = None, *, limit: int | None = None) -> Sequence[ModelVersion]:
        """Return all versions of one name, or of all names, newest first, or the newest ones only.

        Raises:
            RegistryError: The name does not exist; the hint lists similar names.
        """
        if name is None:
            return self._read("", limit=limit)
        versions = self._read("WHERE m.name = ?", name, limit=limit, order="v.number DESC")
        if not versions:
            raise unknown_name(self.uri, name, self._names())
        return versions

    def compiled_from(self, source_uri: str) -> Sequence[ModelVersion]:
        """Return every version that was compiled from that source model, newest first."""
        # SQLite's JSON functions refuse entries with figures that are not finite.
        candidates = self._read("WHERE instr(v.entry, ?)", json.dumps(source_uri))
        return [version for version in candidates if version.source_uri == source_uri]

    def set_stage(self, name: str, version: int, stage: Stage, *, who: str, reason: str = "") -> ModelVersion:
        """Move a version to a stage, and archive the version that it replaces in staging or production.

        Raises:
            RegistryError: The stage, name or number does not exist.
        """
        check_stage(stage)
        self.get(name, version)
        with _write_transaction(self._path) as db:
            # Read again, because only now no other process can move a version.
            chosen = _version(
                db.execute(_SELECT + "WHERE m.name = ? AND v.number = ?", (name, version)).fetchone()
            )
            if chosen.stage != stage:
                if is_exclusive(stage):
                    for row in db.execute(_SELECT + "WHERE m.name = ? AND v.stage = ?", (name, stage)).fetchall():
                        _move(db, _version(row), "archived", who, replaced_by(version, stage))
                _move(db, chosen, stage, who, reason)
        return chosen.model_copy(update={"stage": stage})

    def note(self, name: str, version: int, *, who: str, reason: str) -> Promotion:
        """Record a note on a version, which stays in its stage.

        Raises:
            RegistryError: The name or number does not exist.
        """
        self.get(name, version)
        with _write_transaction(self._path) as db:
            row = db.execute(_SELECT + "WHERE m.name = ? AND v.number = ?", (name, version)).fetchone()
            chosen = _version(row)
            return _record(db, chosen, chosen.stage, who, reason)

    def promotions(self, name: str, version: int) -> Sequence[Promotion]:
        """Return every change of a version's stage and every note on it, oldest first.

        Raises:
            RegistryError: The name or number does not exist.
        """
        self.get(name, version)
        with _reading(self._path) as (db, schema):
            if schema < 2:
                return []
            rows = db.execute(
                "SELECT p.at, p.stage, p.who, p.reason FROM promotion p JOIN model m ON m.id = p.model_id"
                " WHERE m.name = ? AND p.number = ? ORDER BY p.id",
                (name, version),
            )
            names = ("at", "stage", "who", "reason")
            place = f"Version {version} of {name} in the registry's file"
            return [read_promotion(dict(zip(names, row, strict=True)), place) for row in rows]

    def _names(self) -> list[str]:
        if not self._path.exists():
            return []
        with _reading(self._path) as (db, schema):
            return [name for (name,) in db.execute("SELECT name FROM model")] if schema else []

    def _read(
        self,
        condition: str,
        *values: str | int,
        limit: int | None = None,
        order: str = "v.created_at DESC, m.name, v.number DESC",
    ) -> list[ModelVersion]:
        if not self._path.exists():
            return []
        with _reading(self._path) as (db, schema):
            if schema == 0:
                return []
            query = f"{_SELECT}{condition} ORDER BY {order} LIMIT ?"
            if schema < 2:
                # Such a file has no stages, and may be read-only, so that it cannot be migrated.
                query = query.replace("v.stage", "'none'")
            rows = db.execute(query, (*values, -1 if limit is None else limit))
            return [_version(row) for row in rows]


def _move(db: sqlite3.Connection, version: ModelVersion, stage: Stage, who: str, reason: str) -> None:
    db.execute(
        "UPDATE version SET stage = ? WHERE model_id = (SELECT id FROM model WHERE name = ?) AND number = ?",
        (stage, version.name, version.version),
    )
    _record(db, version, stage, who, reason)


def _record(db: sqlite3.Connection, version: ModelVersion, stage: Stage, who: str, reason: str) -> Promotion:
    promotion = Promotion(at=_now(), stage=stage, who=who, reason=reason)
    db.execute(
        "INSERT INTO promotion(model_id, number, at, stage, who, reason)"
        " SELECT id, ?, ?, ?, ?, ? FROM model WHERE name = ?",
        (version.version, promotion.at, stage, who, reason, version.name),
    )
    return promotion


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _version(row: tuple[str, int, str, str, Stage]) -> ModelVersion:
    name, number, created_at, entry, stage = row
    registry_fields = {"name": name, "version": number, "created_at": created_at, "stage": stage}
    return read_version(entry, f"Version {number} in the registry's file", registry_fields)


@contextmanager
def _write_transaction(path: Path) -> Iterator[sqlite3.Connection]:
    """Give the file, created and migrated if necessary, in a transaction that ends completely or not at all.

    Raises:
        RegistryError: The file cannot be written, or has a newer schema.
        RegistryUnavailableError: Another process holds the file for too long.
    """
    with os_errors(path, "write the registry", kind=RegistryError):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink() and not path.exists():
            raise RegistryError(f"The registry {path} is a link to nothing.", hint="Delete the link.")
    _check_no_journal(path)
    with _errors(path), closing(sqlite3.connect(path, isolation_level=None, timeout=_WAIT_S)) as db:
        _check_is_registry(db, path)
        _use_wal(db)
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("BEGIN IMMEDIATE")
        try:
            _migrate(db, path)
            yield db
        except BaseException:
            db.execute("ROLLBACK")
            raise
        db.execute("COMMIT")


@contextmanager
def _reading(path: Path) -> Iterator[tuple[sqlite3.Connection, int]]:
    """Give the existing file and its schema, 0 while it is empty. It may be read-only, so nothing is migrated.

    Raises:
        RegistryError: The file cannot be read, or has a newer schema.
        RegistryUnavailableError: Another process holds the file for too long.
    """
    _check_no_journal(path)
    with _errors(path), closing(_open_to_read(path)) as db:
        yield db, _known_schema(db, path)


def _open_to_read(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, isolation_level=None, timeout=_WAIT_S)
    try:
        _schema_version(db)
    except sqlite3.OperationalError as error:
        db.close()
        # A write-ahead log needs files beside it. Where this process cannot create them and none exist, the
        # registry has no writer.
        if error.sqlite_errorcode & 0xFF not in _CANNOT_WRITE or Path(f"{path}-wal").exists():
            raise
        return sqlite3.connect(f"{path.absolute().as_uri()}?immutable=1", uri=True, isolation_level=None)
    except BaseException:
        db.close()
        raise
    return db


def _check_no_journal(path: Path) -> None:
    """Refuse a file with a rollback journal: SQLite would delete a file that the journal names.

    compileflow uses a write-ahead log. Only the process that makes the file has a journal, for a moment.
    """
    journal, deadline = f"{path}-journal", time.monotonic() + _MAKING_S
    while os.path.lexists(journal):
        if time.monotonic() > deadline:
            raise RegistryError(
                f"{journal} lies beside the registry, which compileflow did not write.",
                hint="Find out who changed that folder, and move the file away.",
            )
        time.sleep(0.05)


def _check_is_registry(db: sqlite3.Connection, path: Path) -> None:
    """Refuse the database of another program, before anything in it changes."""
    # In one statement, because another process may make the registry at this moment.
    query = "SELECT (SELECT user_version FROM pragma_user_version), EXISTS (SELECT 1 FROM sqlite_schema)"
    if db.execute(query).fetchone() == (0, 1):
        raise RegistryError(
            f"{path} is the database of another program.", hint="Give the registry a file of its own."
        )


def _migrate(db: sqlite3.Connection, path: Path) -> None:
    for script in _MIGRATIONS[_known_schema(db, path) :]:
        for statement in script.split(";"):
            db.execute(statement)
    # Only speed depends on it, so it makes no schema of its own.
    db.execute(_BY_TIME)
    if _schema_version(db) != SCHEMA_VERSION:
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _known_schema(db: sqlite3.Connection, path: Path) -> int:
    schema = _schema_version(db)
    if schema > SCHEMA_VERSION:
        raise RegistryError(
            f"Expected {path} to have registry schema {SCHEMA_VERSION} or older, got schema {schema}.",
            hint="Install the version of compileflow that wrote it.",
        )
    db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MOST_ROW_BYTES)
    # Views, triggers and computed columns run when a statement of this module does, and may never end.
    for kind, name, sql in db.execute(_OBJECTS):
        if _normalized(sql) not in _own_objects(schema):
            raise RegistryError(
                f"The registry {path} has the {kind} {name!r:.80}, which compileflow did not write.",
                hint="Find out who changed the file, and restore a copy of it.",
            )
    return schema


@cache
def _own_objects(schema: int) -> frozenset[str]:
    """Return the statements that make the tables and indexes of a schema, as SQLite keeps them."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        for script in (*_MIGRATIONS[:schema], *([_BY_TIME] if schema else [])):
            db.executescript(script)
        return frozenset(_normalized(sql) for _, _, sql in db.execute(_OBJECTS))


def _normalized(sql: str) -> str:
    return " ".join(sql.split())


def _schema_version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def _use_wal(db: sqlite3.Connection) -> None:
    """Switch to the write-ahead log. SQLite does not wait for other processes in this statement."""
    deadline = time.monotonic() + _WAIT_S
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        text = f"The registry {path} failed: {error}."
        if "locked" in str(error) or "busy" in str(error):
            raise RegistryUnavailableError(text, hint="Another process uses it; try again.") from error
        # SQLite tells either, when the disk is full.
        if "full" in str(error) or "disk I/O" in str(error):
            raise RegistryError(text, hint="Free some space on its disk, and run again.") from error
        raise RegistryError(text, hint="Check that file and your access rights to it.") from error
