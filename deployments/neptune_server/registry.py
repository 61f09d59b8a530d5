"""The registry: one folder with all of the server's data, open in one server at a time."""

from __future__ import annotations

import fcntl
import os
import secrets
from pathlib import Path

from deployments.neptune_server.blobs import Blobs
from deployments.neptune_server.containers import create_project, find_project
from deployments.neptune_server.database import Database
from deployments.neptune_server.errors import ApiError
from deployments.neptune_server.files import Files


class InUseError(Exception):
    """Another server has the folder open."""


class Registry:
    """The folder's contents: registry.db, blobs/, unfinished/, token, lock.

    Args:
        root: The folder. It is created if it does not exist; only its owner can read it.

    Raises:
        InUseError: Another server has the folder open.
    """

    def __init__(self, root: Path):
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.root = root
        # The operating system releases the lock when the process ends, even after SIGKILL.
        self._lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise InUseError(f"{root} is in use by another server. Stop it, or choose another --root.") from error
        self.database = Database(root / "registry.db")
        self.blobs = Blobs(root / "blobs", root / "unfinished")
        self.files = Files(self.database, self.blobs)

    @property
    def token_path(self) -> Path:
        """The file with the API token."""
        return self.root / "token"

    def secret(self) -> bytes:
        """Return the key that signs session tokens; the first call creates it."""
        with self.database.writing() as db:
            db.execute("INSERT OR IGNORE INTO setting VALUES ('session_secret', ?)", (secrets.token_hex(32),))
            row = db.execute("SELECT value FROM setting WHERE name = 'session_secret'").fetchone()
            return bytes.fromhex(row["value"])

    def ensure_project(self, name: str) -> None:
        """Create the project "workspace/name" unless it exists."""
        with self.database.writing() as db:
            try:
                find_project(db, name)
            except ApiError:
                create_project(db, name)

    def sweep(self) -> int:
        """Delete the files that a kill or a deleted version left on disk; return their number."""
        uploads = self.files.forget_old_uploads()
        used = {row["sha256"] for row in self.database.reading.execute("SELECT DISTINCT sha256 FROM file")}
        return self.blobs.sweep(used=used, uploads=uploads)

    def close(self) -> None:
        """Write the database's log into its file, and release the folder."""
        self.database.reading.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self.database.close()
        os.close(self._lock)
