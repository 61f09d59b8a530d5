"""Uploads in parts: their state is in the database, so that they go on after the server was restarted."""

from __future__ import annotations

import os
import re
import secrets
import sqlite3
import threading
from datetime import UTC, datetime, timedelta

from deployments.neptune_server.blobs import Blobs, Reader, pieces
from deployments.neptune_server.containers import find_container, iso_time, now
from deployments.neptune_server.database import Database
from deployments.neptune_server.errors import ApiError, FieldError
from deployments.neptune_server.files import Files, attach

_RANGE = re.compile(r"bytes=(\d+)-(\d+)/(\d+)")
_KEPT = timedelta(days=7)


class Uploads:
    """Files that come in parts, each part at its place in one unfinished file."""

    def __init__(self, database: Database, blobs: Blobs, files: Files):
        self._database = database
        self._blobs = blobs
        self._files = files
        self._finishing = threading.Lock()

    def start(self, container_id: str, path: str, *, size: int, sub_path: str | None, ext: str) -> str:
        """Start an upload of `size` bytes and return its id."""
        self._files.check(container_id, path, sub_path)
        upload = secrets.token_hex(16)
        with self._database.writing() as db:
            container = find_container(db, container_id)
            db.execute(
                "INSERT INTO upload VALUES (?, ?, ?, ?, ?, ?, ?, NULL)",
                (upload, container.id, path, sub_path, ext, size, now()),
            )
        return upload

    def add_part(self, upload: str, body: Reader, *, size: int, x_range: str) -> None:
        """Write one part to its place, and note it once it is on disk. The same part again changes nothing.

        Args:
            upload: The upload's id.
            body: The part.
            size: Bytes that the request announces.
            x_range: "bytes=FIRST-LAST/WHOLE".

        Raises:
            ApiError: 400, the part is not what its range says; 404, no such upload.
        """
        row = self._find(self._database.reading, upload)
        if row["sha256"] is not None:
            return
        found = _RANGE.fullmatch(x_range)
        first, last, whole = (int(number) for number in found.groups()) if found else (0, -1, -1)
        if whole != row["size"] or last - first + 1 != size or last >= whole:
            # The client knows this text: it reads the file again.
            raise ApiError(400, "Length of stream does not match given range", detail=f"{x_range}, {size} bytes")
        target = os.open(self._blobs.unfinished(upload), os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            at = first
            for piece in pieces(body):
                at += os.pwrite(target, piece, at)
            os.fsync(target)
        finally:
            os.close(target)
        with self._database.writing() as db:
            db.execute("INSERT OR REPLACE INTO part VALUES (?, ?, ?)", (upload, first, size))

    def finish(self, upload: str) -> None:
        """Put the parts together and make the file the field's; again, it changes nothing.

        Raises:
            ApiError: 404, no such upload.
            FieldError: parts are missing.
        """
        # A client that got no reply asks again while the first call is still at it.
        with self._finishing:
            if self._find(self._database.reading, upload)["sha256"] is None:
                self._finish(upload)

    def forget_old(self) -> set[str]:
        """Forget uploads that nobody went on with for a week; return the ids of the others."""
        limit = iso_time(datetime.now(UTC) - _KEPT)
        with self._database.writing() as db:
            db.execute("DELETE FROM upload WHERE started_at < ?", (limit,))
            going_on = {row["id"] for row in db.execute("SELECT id FROM upload WHERE sha256 IS NULL")}
            # As in a copy of the folder without unfinished/: what was sent is lost, and has to be sent again.
            lost = [(upload,) for upload in going_on if not self._blobs.unfinished(upload).exists()]
            db.executemany("DELETE FROM part WHERE upload = ?", lost)
            return going_on

    def _finish(self, upload: str) -> None:
        db = self._database.reading
        row = self._find(db, upload)
        end = 0
        for part in db.execute("SELECT start, size FROM part WHERE upload = ? ORDER BY start", (upload,)):
            if part["start"] > end:
                break
            end = max(end, part["start"] + part["size"])
        if end != row["size"]:
            raise FieldError(f"Upload {upload} has {end} of {row['size']} bytes without a gap: send the rest.")
        sha256, size = self._blobs.place(self._blobs.unfinished(upload))
        with self._database.writing() as db:
            attach(db, row["container"], row["path"], [(row["sub_path"], sha256, size)], ext=row["ext"])
            db.execute("UPDATE upload SET sha256 = ? WHERE id = ?", (sha256, upload))
            db.execute("DELETE FROM part WHERE upload = ?", (upload,))
        self._blobs.unfinished(upload).unlink()

    def _find(self, db: sqlite3.Connection, upload: str) -> sqlite3.Row:
        row: sqlite3.Row | None = db.execute("SELECT * FROM upload WHERE id = ?", (upload,)).fetchone()
        if row is None:
            raise ApiError(404, "Upload not found", detail=f"There is no upload {upload!r}; start it again.")
        return row
