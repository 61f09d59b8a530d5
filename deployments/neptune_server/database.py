"""The server's SQLite database: its tables, one connection per thread, one writer at a time."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deployments.neptune_server.patterns import compiled

_SCHEMA_VERSION = 1
# Only speed depends on it, so it makes no schema of its own. Long texts differ early.
_INDEX = (
    "CREATE INDEX IF NOT EXISTS attribute_by_text ON attribute(path, substr(value, 1, 64)) WHERE type = 'string'"
)
_LOCK_TIMEOUT_S = 30.0
_SCHEMA = """
CREATE TABLE setting(name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE project(
    id TEXT PRIMARY KEY, workspace TEXT NOT NULL, name TEXT NOT NULL, key TEXT NOT NULL,
    UNIQUE(workspace, name), UNIQUE(workspace, key)
);
CREATE TABLE container(
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL,
    project TEXT NOT NULL REFERENCES project(id), parent TEXT NOT NULL,
    type TEXT NOT NULL, short_id TEXT NOT NULL, children INTEGER NOT NULL DEFAULT 0,
    UNIQUE(project, short_id)
);
CREATE INDEX container_by_parent ON container(parent);
CREATE TABLE attribute(
    container TEXT NOT NULL REFERENCES container(id) ON DELETE CASCADE,
    path TEXT NOT NULL, type TEXT NOT NULL, value,
    PRIMARY KEY(container, path)
) WITHOUT ROWID;
CREATE TABLE point(
    position INTEGER PRIMARY KEY, container TEXT NOT NULL, path TEXT NOT NULL,
    step REAL NOT NULL, timestamp_ms INTEGER NOT NULL, value,
    FOREIGN KEY(container, path) REFERENCES attribute(container, path) ON DELETE CASCADE
);
CREATE INDEX point_of_attribute ON point(container, path);
CREATE TABLE file(
    container TEXT NOT NULL, path TEXT NOT NULL, sub_path TEXT NOT NULL,
    sha256 TEXT NOT NULL, size INTEGER NOT NULL, changed_at TEXT NOT NULL,
    PRIMARY KEY(container, path, sub_path),
    FOREIGN KEY(container, path) REFERENCES attribute(container, path) ON DELETE CASCADE
) WITHOUT ROWID;
CREATE TABLE upload(
    id TEXT PRIMARY KEY, container TEXT NOT NULL REFERENCES container(id) ON DELETE CASCADE,
    path TEXT NOT NULL, sub_path TEXT, ext TEXT NOT NULL, size INTEGER NOT NULL,
    started_at TEXT NOT NULL, sha256 TEXT
);
CREATE TABLE part(
    upload TEXT NOT NULL REFERENCES upload(id) ON DELETE CASCADE,
    start INTEGER NOT NULL, size INTEGER NOT NULL,
    PRIMARY KEY(upload, start)
) WITHOUT ROWID;
CREATE TABLE artifact(
    project TEXT NOT NULL REFERENCES project(id), hash TEXT NOT NULL, size INTEGER, files TEXT,
    PRIMARY KEY(project, hash)
) WITHOUT ROWID;
"""


class Database:
    """One SQLite file for the threads of one process.

    Args:
        path: The SQLite file. It is created if it does not exist.

    Raises:
        ValueError: The file has the schema of another version of this server.
    """

    def __init__(self, path: Path):
        self._path = path
        self._local = threading.local()
        self._writers = threading.Lock()
        with self.writing() as db:
            version = int(db.execute("PRAGMA user_version").fetchone()[0])
            if version == 0:
                for statement in _SCHEMA.split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
            elif version != _SCHEMA_VERSION:
                raise ValueError(
                    f"{path}: expected schema version {_SCHEMA_VERSION}, got {version}. "
                    "Start the version of the server that created it."
                )
            db.execute(_INDEX)

    @property
    def reading(self) -> sqlite3.Connection:
        """This thread's connection."""
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = self._connect()
        return connection

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Yield this thread's connection in a transaction, which is on disk when the block ends."""
        db = self.reading
        # SQLite does not serve waiting writers in order; twenty writers would starve each other.
        with self._writers:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")

    def close(self) -> None:
        """Close this thread's connection."""
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is not None:
            self._local.connection = None
            connection.close()

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, isolation_level=None, timeout=_LOCK_TIMEOUT_S)
        db.row_factory = sqlite3.Row
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
        db.create_function("regexp", 2, _regexp, deterministic=True)
        return db


def _regexp(pattern: str, value: object) -> bool:
    return compiled(pattern).search(str(value)) is not None
