"""All that the server keeps, in one folder that one server at a time holds."""

from __future__ import annotations

import fcntl
import os
import secrets
import sqlite3
from pathlib import Path

from deployments.neptune_server.blobs import Blobs
from deployments.neptune_server.containers import find_project, make_project
from deployments.neptune_server.database import Database
from deployments.neptune_server.errors import ApiError
from deployments.neptune_server.files import Files
from deployments.neptune_server.uploads import Uploads


class InUseError(Exception):
    """Another server holds the folder."""


class Registry:
    """The folder's contents: registry.db, blobs/, unfinished/, token, lock.

    Args:
        root: The folder; made when absent, readable to its owner only.

    Raises:
        InUseError: another server holds it.
    """

    def __init__(self, root: Path):
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.root = root
        # Held until the process ends, however it does.
        self._lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise InUseError(f"{root} is in use by another server. Stop it, or choose another --root.") from error
        self.database = Database(root / "registry.db")
        self.blobs = Blobs(root / "blobs", root / "unfinished")
        self.files = Files(self.database, self.blobs)
        self.uploads = Uploads(self.database, self.blobs, self.files)

    @property
    def token_path(self) -> Path:
        """The file with the API token."""
        return self.root / "token"

    def secret(self) -> bytes:
        """Return what session tokens are signed with; made once."""
        with self.database.writing() as db:
            db.execute("INSERT OR IGNORE INTO setting VALUES ('session_secret', ?)", (secrets.token_hex(32),))
            row = db.execute("SELECT value FROM setting WHERE name = 'session_secret'").fetchone()
            return bytes.fromhex(row["value"])

    def ensure_project(self, qualified: str) -> None:
        """Make a project "workspace/name" unless it is there."""
        with self.database.writing() as db:
            try:
                find_project(db, qualified)
            except ApiError:
                make_project(db, qualified)

    def sweep(self) -> int:
        """Delete what a kill or deleted versions left on disk; return the number of files."""
        uploads = self.uploads.forget_old()
        return self.blobs.sweep(used=_used(self.database.reading), uploads=uploads)

    def close(self) -> None:
        """Write the log into the database file and let go of the folder."""
        self.database.reading.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self.database.close()
        os.close(self._lock)


def _used(db: sqlite3.Connection) -> set[str]:
    return {row["sha256"] for row in db.execute("SELECT DISTINCT sha256 FROM file")}
