"""Files of models and versions: uploads of single files and file sets, whole or in parts, and downloads."""

from __future__ import annotations

import json
import os
import re
import secrets
import sqlite3
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import PurePosixPath
from typing import IO, Any, cast

from deployments.neptune_server.blobs import Blobs, Reader, blocks
from deployments.neptune_server.containers import Container, find_container, iso_time, now
from deployments.neptune_server.database import Database
from deployments.neptune_server.errors import ApiError, FieldError, bad_request
from deployments.neptune_server.fields import check_type, no_field, put_file_field, set_size, touch

StoredFile = tuple[str | None, str, int]
"""Path inside the file set, or None if the field is a single file; SHA-256; size in bytes."""

_RANGE = re.compile(r"bytes=(\d+)-(\d+)/(\d+)")
_UPLOAD_LIFETIME = timedelta(days=7)


class Files:
    """Uploads and downloads.

    The parts of an upload go to their places in one unfinished file. The database records them, so that an upload
    continues after the server is restarted.
    """

    def __init__(self, database: Database, blobs: Blobs):
        self._database = database
        self._blobs = blobs
        self._finishing = threading.Lock()

    def upload(self, container_id: str, path: str, body: Reader, *, sub_path: str | None, ext: str) -> None:
        """Store a file that comes in one piece.

        Raises:
            ApiError: 404, the container does not exist.
            FieldError: The field has another type, or the path leads out of the file set.
        """
        self._check(container_id, path, sub_path)
        file = (sub_path, *self._blobs.add(body))
        with self._database.writing() as db:
            _attach(db, container_id, path, [file], ext=ext)

    def upload_tar(self, container_id: str, path: str, body: Reader) -> None:
        """Store the files of a tar.gz in a file set, all of them or none.

        Raises:
            ApiError: 400, the tar.gz is damaged; 404, the container does not exist.
            FieldError: The field has another type, or a path leads out of the file set.
        """
        self._check(container_id, path, "")
        files: list[StoredFile] = []
        try:
            with tarfile.open(fileobj=cast("IO[bytes]", body), mode="r|gz") as archive:
                for member in archive:
                    content = archive.extractfile(member) if member.isfile() else None
                    if content is not None:
                        files.append((_safe_path(member.name), *self._blobs.add(content)))
        except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
            raise bad_request(f"The tar.gz cannot be read: {error}.") from error
        with self._database.writing() as db:
            _attach(db, container_id, path, files)

    def start_upload(self, container_id: str, path: str, *, size: int, sub_path: str | None, ext: str) -> str:
        """Start an upload of `size` bytes in parts and return its id.

        Raises:
            ApiError: 404, the container does not exist.
            FieldError: The field has another type, or the path leads out of the file set.
        """
        self._check(container_id, path, sub_path)
        upload = secrets.token_hex(16)
        with self._database.writing() as db:
            container = find_container(db, container_id)
            db.execute(
                "INSERT INTO upload VALUES (?, ?, ?, ?, ?, ?, ?, NULL)",
                (upload, container.id, path, sub_path, ext, size, now()),
            )
        return upload

    def add_part(self, upload: str, body: Reader, *, size: int, x_range: str) -> None:
        """Write one part of an upload to its place. Sending the same part again changes nothing.

        Args:
            upload: Id of the upload.
            body: The part.
            size: Number of bytes that the request announces.
            x_range: Place of the part, as "bytes=FIRST-LAST/TOTAL".

        Raises:
            ApiError: 400, the part does not have the size of its range; 404, the upload does not exist.
        """
        row = _find_upload(self._database.reading, upload)
        if row["sha256"] is not None:
            return
        match = _RANGE.fullmatch(x_range)
        first, last, total = (int(number) for number in match.groups()) if match else (0, -1, -1)
        if total != row["size"] or last - first + 1 != size or last >= total:
            # The client looks for this title; it then reads the file again.
            raise ApiError(400, "Length of stream does not match given range", detail=f"{x_range}, {size} bytes")
        target = os.open(self._blobs.unfinished(upload), os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            position = first
            for block in blocks(body):
                position += os.pwrite(target, block, position)
            os.fsync(target)
        finally:
            os.close(target)
        with self._database.writing() as db:
            db.execute("INSERT OR REPLACE INTO part VALUES (?, ?, ?)", (upload, first, size))

    def finish_upload(self, upload: str) -> None:
        """Make the parts of an upload the file of its field. Finishing an upload again changes nothing.

        Raises:
            ApiError: 404, the upload does not exist.
            FieldError: Parts are missing.
        """
        # A client that gets no response repeats the call while the first call is still running.
        with self._finishing:
            db = self._database.reading
            row = _find_upload(db, upload)
            if row["sha256"] is not None:
                return
            end = 0
            for part in db.execute("SELECT start, size FROM part WHERE upload = ? ORDER BY start", (upload,)):
                if part["start"] > end:
                    break
                end = max(end, part["start"] + part["size"])
            if end != row["size"]:
                raise FieldError(
                    f"Upload {upload}: expected {row['size']} bytes without a gap, got {end} of them. "
                    "Send the missing parts."
                )
            sha256, size = self._blobs.place(self._blobs.unfinished(upload))
            with self._database.writing() as db:
                _attach(db, row["container"], row["path"], [(row["sub_path"], sha256, size)], ext=row["ext"])
                db.execute("UPDATE upload SET sha256 = ? WHERE id = ?", (sha256, upload))
                db.execute("DELETE FROM part WHERE upload = ?", (upload,))
            self._blobs.unfinished(upload).unlink()

    def forget_old_uploads(self) -> set[str]:
        """Forget uploads that started more than a week ago; return the ids of the other unfinished ones."""
        limit = iso_time(datetime.now(UTC) - _UPLOAD_LIFETIME)
        with self._database.writing() as db:
            db.execute("DELETE FROM upload WHERE started_at < ?", (limit,))
            uploads = {row["id"] for row in db.execute("SELECT id FROM upload WHERE sha256 IS NULL")}
            # A backup has no unfinished/, so the client must send all parts again.
            without_file = [(upload,) for upload in uploads if not self._blobs.unfinished(upload).exists()]
            db.executemany("DELETE FROM part WHERE upload = ?", without_file)
            return uploads

    def find(self, container_id: str, path: str) -> tuple[str, str]:
        """Return the SHA-256 of a single file, and the name under which the client saves it.

        Raises:
            ApiError: 404, the container or the file does not exist.
        """
        db = self._database.reading
        container = find_container(db, container_id)
        row = _rows(db, container, path).fetchone()
        if row is None or row["sub_path"]:
            raise no_field(container, path)
        field = db.execute(
            "SELECT value FROM attribute WHERE container = ? AND path = ?", (container.id, path)
        ).fetchone()
        value = json.loads(field["value"])
        return row["sha256"], ".".join(filter(None, (value["name"], value["ext"])))

    def entries(self, container_id: str, path: str, folder: str) -> list[dict[str, Any]]:
        """Return the entries of one folder of a file set, folders first.

        Raises:
            ApiError: 404, the container or the file set does not exist.
        """
        files: list[dict[str, Any]] = []
        folders: dict[str, dict[str, Any]] = {}
        prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
        for row in self._file_set(container_id, path):
            if not row["sub_path"].startswith(prefix):
                continue
            name, _, rest = row["sub_path"].removeprefix(prefix).partition("/")
            entry = {"name": name, "size": row["size"], "mtime": row["changed_at"]}
            if not rest:
                files.append({**entry, "fileType": "file"})
            elif name in folders:
                folders[name]["size"] += row["size"]
            else:
                folders[name] = {**entry, "fileType": "directory"}
        return [*folders.values(), *files]

    def write_zip(self, container_id: str, path: str, file: IO[bytes]) -> None:
        """Write a file set as a zip without compression, because weights do not get smaller.

        Raises:
            ApiError: 404, the container or the file set does not exist.
        """
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for row in self._file_set(container_id, path):
                entry = zipfile.ZipInfo(row["sub_path"])
                entry.file_size = row["size"]
                with self._blobs.path(row["sha256"]).open("rb") as source, archive.open(entry, "w") as target:
                    for block in blocks(source):
                        target.write(block)

    def check_file_set(self, container_id: str, path: str) -> None:
        """Check that a field is a file set.

        Raises:
            ApiError: 404, the container or the file set does not exist.
        """
        self._file_set(container_id, path)

    def _check(self, container_id: str, path: str, sub_path: str | None) -> None:
        """Refuse an upload that the field cannot take before its bytes are stored."""
        if sub_path:
            _safe_path(sub_path)
        db = self._database.reading
        check_type(db, find_container(db, container_id), path, "file" if sub_path is None else "fileSet")

    def _file_set(self, container_id: str, path: str) -> list[sqlite3.Row]:
        db = self._database.reading
        container = find_container(db, container_id)
        field = db.execute(
            "SELECT 1 FROM attribute WHERE container = ? AND path = ? AND type = 'fileSet'", (container.id, path)
        ).fetchone()
        if field is None:
            raise no_field(container, path)
        return _rows(db, container, path).fetchall()


def _attach(
    db: sqlite3.Connection, container_id: str, path: str, files: Sequence[StoredFile], *, ext: str = ""
) -> None:
    """Make stored files the files of a field. A single file replaces the old one, a file set grows."""
    container = find_container(db, container_id)
    single = any(sub_path is None for sub_path, _, _ in files)
    field_type = "file" if single else "fileSet"
    check_type(db, container, path, field_type)
    value: Any = None
    if single:
        name = path.rpartition("/")[2]
        value = json.dumps({"name": name, "ext": ext, "size": files[0][2]})
    # The rows of the files refer to the row of the field, so that row comes first.
    put_file_field(db, container, path, field_type, value)
    if single:
        db.execute("DELETE FROM file WHERE container = ? AND path = ?", (container.id, path))
    db.executemany(
        "INSERT OR REPLACE INTO file VALUES (?, ?, ?, ?, ?, ?)",
        [(container.id, path, sub_path or "", sha256, size, now()) for sub_path, sha256, size in files],
    )
    put_file_field(db, container, path, field_type, value if single else set_size(db, container, path))
    touch(db, container)


def _safe_path(name: str) -> str:
    """Return the path of a file inside its set.

    Raises:
        FieldError: The path leads out of the set, where unpacking the zip would write a file.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise FieldError(f"{name!r} is not a path inside the file set. Use a relative path without '..'.")
    return path.as_posix()


def _find_upload(db: sqlite3.Connection, upload: str) -> sqlite3.Row:
    row: sqlite3.Row | None = db.execute("SELECT * FROM upload WHERE id = ?", (upload,)).fetchone()
    if row is None:
        raise ApiError(
            404, "Upload not found", detail=f"The upload {upload!r} does not exist. Start the upload again."
        )
    return row


def _rows(db: sqlite3.Connection, container: Container, path: str) -> sqlite3.Cursor:
    return db.execute(
        "SELECT * FROM file WHERE container = ? AND path = ? ORDER BY sub_path", (container.id, path)
    )
