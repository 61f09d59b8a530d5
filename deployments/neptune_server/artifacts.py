"""Artifacts of `track_files`: paths and hashes of files that stay where they are."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

from deployments.neptune_server.containers import Project
from deployments.neptune_server.errors import ApiError

ArtifactFiles = Sequence[Mapping[str, Any]]


def create(db: sqlite3.Connection, project: Project, digest: str, size: int | None) -> dict[str, Any]:
    """Record an artifact by its hash, unless it is recorded."""
    db.execute("INSERT OR IGNORE INTO artifact VALUES (?, ?, ?, NULL)", (project.id, digest, size))
    return _to_json(db, project, digest)


def describe(db: sqlite3.Connection, project: Project, digest: str, files: ArtifactFiles) -> dict[str, Any]:
    """Record the files of an artifact."""
    db.execute(
        "UPDATE artifact SET files = ? WHERE project = ? AND hash = ?", (json.dumps(files), project.id, digest)
    )
    return _to_json(db, project, digest)


def extend(db: sqlite3.Connection, project: Project, digest: str, files: ArtifactFiles) -> dict[str, Any]:
    """Record a new artifact: an old one with more files. A new file replaces an old file with the same path."""
    by_path = {file["filePath"]: file for file in [*list_files(db, project, digest), *files]}
    all_files = [by_path[path] for path in sorted(by_path)]
    text = "".join(f"{file['filePath']}\0{file['fileHash']}\0" for file in all_files)
    new_digest = hashlib.sha256(text.encode()).hexdigest()
    size = sum(file.get("size") or 0 for file in all_files)
    db.execute(
        "INSERT OR IGNORE INTO artifact VALUES (?, ?, ?, ?)", (project.id, new_digest, size, json.dumps(all_files))
    )
    return _to_json(db, project, new_digest)


def list_files(db: sqlite3.Connection, project: Project, digest: str) -> list[Mapping[str, Any]]:
    """Return the files of an artifact.

    Raises:
        ApiError: 404, the project has no such artifact.
    """
    files: list[Mapping[str, Any]] = json.loads(_find(db, project, digest)["files"] or "[]")
    return files


def _to_json(db: sqlite3.Connection, project: Project, digest: str) -> dict[str, Any]:
    row = _find(db, project, digest)
    return {
        "artifactHash": digest,
        "hash": digest,
        "size": row["size"],
        "receivedMetadata": row["files"] is not None,
    }


def _find(db: sqlite3.Connection, project: Project, digest: str) -> sqlite3.Row:
    row: sqlite3.Row | None = db.execute(
        "SELECT * FROM artifact WHERE project = ? AND hash = ?", (project.id, digest)
    ).fetchone()
    if row is None:
        raise ApiError(404, "Artifact not found", detail=f"{project.qualified_name} has no artifact {digest!r}.")
    return row
