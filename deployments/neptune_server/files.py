"""Files of models and versions: single files and file sets, uploaded whole or as tar, and downloaded."""

from __future__ import annotations

import json
import sqlite3
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import IO, Any, cast

from deployments.neptune_server.blobs import Blobs, Reader, pieces
from deployments.neptune_server.containers import Container, find_container, now
from deployments.neptune_server.database import Database
from deployments.neptune_server.errors import FieldError, bad_request
from deployments.neptune_server.fields import check_type, no_field, put_file_field, set_size, touch

Added = tuple[str | None, str, int]
"""Path inside a file set (None: the field is a single file), SHA-256, size in bytes."""


class Files:
    """Uploads and downloads of whole files."""

    def __init__(self, database: Database, blobs: Blobs):
        self._database = database
        self._blobs = blobs

    def upload(self, container_id: str, path: str, body: Reader, *, sub_path: str | None, ext: str) -> None:
        """Keep a file that comes in one piece.

        Raises:
            ApiError: no such container.
            FieldError: the field has another type.
        """
        self.check(container_id, path, sub_path)
        self.attach(container_id, path, [(sub_path, *self._blobs.add(body))], ext=ext)

    def upload_tar(self, container_id: str, path: str, body: Reader, *, reset: bool) -> None:
        """Keep the files of a tar.gz in a file set: all of them or none.

        Args:
            container_id: Whose field.
            path: The field.
            body: The tar.gz; read as it comes.
            reset: Delete the files that the set has.
        """
        self.check(container_id, path, "")
        added: list[Added] = []
        try:
            with tarfile.open(fileobj=cast("IO[bytes]", body), mode="r|gz") as archive:
                for member in archive:
                    content = archive.extractfile(member) if member.isfile() else None
                    if content is not None:
                        added.append((safe_name(member.name), *self._blobs.add(content)))
        except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
            raise bad_request(f"The tar.gz cannot be read: {error}.") from error
        self.attach(container_id, path, added, reset=reset)

    def check(self, container_id: str, path: str, sub_path: str | None) -> None:
        """Refuse an upload that could not be attached, before its bytes are taken."""
        db = self._database.reading
        if sub_path:
            safe_name(sub_path)
        check_type(db, find_container(db, container_id), path, "file" if sub_path is None else "fileSet")

    def attach(
        self, container_id: str, path: str, added: Sequence[Added], *, ext: str = "", reset: bool = False
    ) -> None:
        """Make files that are kept already those of a field."""
        with self._database.writing() as db:
            attach(db, container_id, path, added, ext=ext, reset=reset)

    def open(self, container_id: str, path: str) -> tuple[str, str]:
        """Return the SHA-256 of a single file, and the name to save it under."""
        db = self._database.reading
        container = find_container(db, container_id)
        row = _rows(db, container, path).fetchone()
        if row is None or row["sub_path"]:
            raise no_field(container, path)
        field = db.execute(
            "SELECT value FROM attribute WHERE container = ? AND path = ?", (container.id, path)
        ).fetchone()
        named = json.loads(field["value"])
        return row["sha256"], ".".join(filter(None, (named["name"], named["ext"])))

    def entries(self, container_id: str, path: str, folder: str) -> list[dict[str, Any]]:
        """Return the entries of one folder of a file set, folders first."""
        files: list[dict[str, Any]] = []
        folders: dict[str, dict[str, Any]] = {}
        start = f"{folder.strip('/')}/" if folder.strip("/") else ""
        for row in self._set(container_id, path):
            if not row["sub_path"].startswith(start):
                continue
            name, _, below = row["sub_path"].removeprefix(start).partition("/")
            entry = {"name": name, "size": row["size"], "mtime": row["changed_at"]}
            if not below:
                files.append({**entry, "fileType": "file"})
            elif name in folders:
                folders[name]["size"] += row["size"]
            else:
                folders[name] = {**entry, "fileType": "directory"}
        return [*folders.values(), *files]

    def write_zip(self, container_id: str, path: str, file: IO[bytes]) -> None:
        """Write a file set as a zip, uncompressed, as weights do not become smaller."""
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for row in self._set(container_id, path):
                entry = zipfile.ZipInfo(row["sub_path"])
                entry.file_size = row["size"]
                with self._blobs.path(row["sha256"]).open("rb") as source, archive.open(entry, "w") as target:
                    for piece in pieces(source):
                        target.write(piece)

    def check_set(self, container_id: str, path: str) -> None:
        """Refuse what is no file set."""
        self._set(container_id, path)

    def _set(self, container_id: str, path: str) -> list[sqlite3.Row]:
        db = self._database.reading
        container = find_container(db, container_id)
        field = db.execute(
            "SELECT 1 FROM attribute WHERE container = ? AND path = ? AND type = 'fileSet'", (container.id, path)
        ).fetchone()
        if field is None:
            raise no_field(container, path)
        return _rows(db, container, path).fetchall()


def attach(
    db: sqlite3.Connection,
    container_id: str,
    path: str,
    added: Iterable[Added],
    *,
    ext: str = "",
    reset: bool = False,
) -> None:
    """Make files that are kept already those of a field, in the caller's transaction."""
    container = find_container(db, container_id)
    added = list(added)
    single = any(sub_path is None for sub_path, _, _ in added)
    kind = "file" if single else "fileSet"
    check_type(db, container, path, kind)
    value: Any = None
    if single:
        name = path.rpartition("/")[2]
        value = json.dumps({"name": name, "ext": ext, "size": added[0][2]})
    # The field's row first: the files' rows refer to it.
    put_file_field(db, container, path, kind, value)
    if reset or single:
        db.execute("DELETE FROM file WHERE container = ? AND path = ?", (container.id, path))
    db.executemany(
        "INSERT OR REPLACE INTO file VALUES (?, ?, ?, ?, ?, ?)",
        [(container.id, path, sub_path or "", sha256, size, now()) for sub_path, sha256, size in added],
    )
    put_file_field(db, container, path, kind, value if single else set_size(db, container, path))
    touch(db, container)


def safe_name(name: str) -> str:
    """Return a file's path inside its set, as it is kept.

    Raises:
        FieldError: it leads out of the set; whoever unpacks the zip would write there.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise FieldError(f"{name!r} is no path inside a file set.")
    return path.as_posix()


def _rows(db: sqlite3.Connection, container: Container, path: str) -> sqlite3.Cursor:
    return db.execute(
        "SELECT * FROM file WHERE container = ? AND path = ? ORDER BY sub_path", (container.id, path)
    )
