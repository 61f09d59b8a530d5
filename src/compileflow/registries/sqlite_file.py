"""The SQLite file of the embedded registry: its schema, migrations, locking, and errors in one line."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compileflow._process.folders import os_errors
from compileflow.errors import RegistryError, RegistryUnavailableError

SCHEMA_VERSION = 2
_WAIT_S = 30.0
_CANNOT_WRITE = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)
# From each schema to the next. A file made today goes through all of them, so that there is one way to get there.
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


@contextmanager
def write_transaction(path: Path) -> Iterator[sqlite3.Connection]:
    """Give the file, made and migrated if need be, in a transaction that is committed whole or not at all.

    Raises:
        RegistryError: it cannot be written, or is of a newer schema.
        RegistryUnavailableError: another process holds it for too long.
    """
    with os_errors(path, "write the registry", kind=RegistryError):
        path.parent.mkdir(parents=True, exist_ok=True)
    with _errors(path), _closing(sqlite3.connect(path, isolation_level=None, timeout=_WAIT_S)) as db:
        _use_wal(db)
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
        with _transaction(db):
            _migrate(db, path)
            yield db


@contextmanager
def reading(path: Path) -> Iterator[tuple[sqlite3.Connection, int]]:
    """Give the existing file and its schema, 0 while it is empty. Nothing is migrated: it may be read-only.

    Raises:
        RegistryError: it cannot be read, or is of a newer schema.
        RegistryUnavailableError: another process holds it for too long.
    """
    with _errors(path), _closing(_open_to_read(path)) as db:
        yield db, _known_schema(db, path)


def _open_to_read(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, isolation_level=None, timeout=_WAIT_S)
    try:
        _schema_version(db)
    except sqlite3.OperationalError as error:
        db.close()
        # A write-ahead log wants files beside it. Where nobody may make them, nobody writes to the registry.
        if error.sqlite_errorcode & 0xFF not in _CANNOT_WRITE or Path(f"{path}-wal").exists():
            raise
        return sqlite3.connect(f"{path.absolute().as_uri()}?immutable=1", uri=True, isolation_level=None)
    except BaseException:
        db.close()
        raise
    return db


@contextmanager
def _closing(db: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    try:
        yield db
    finally:
        db.close()


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


def _migrate(db: sqlite3.Connection, path: Path) -> None:
    for script in _MIGRATIONS[_known_schema(db, path) :]:
        for statement in script.split(";"):
            db.execute(statement)
    if _schema_version(db) != SCHEMA_VERSION:
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _known_schema(db: sqlite3.Connection, path: Path) -> int:
    found = _schema_version(db)
    if found > SCHEMA_VERSION:
        raise RegistryError(
            f"{path} has registry schema {found}; this compileflow knows {SCHEMA_VERSION} and older.",
            hint="Install the compileflow that made it.",
        )
    return found


def _schema_version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


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


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        text = f"The registry {path} failed: {error}."
        if "locked" in str(error) or "busy" in str(error):
            raise RegistryUnavailableError(text, hint="Another process holds it; try again.") from error
        if "full" in str(error):
            raise RegistryError(text, hint="Free some space on its disk, and run again.") from error
        raise RegistryError(text, hint="Check that file and the rights on it.") from error
