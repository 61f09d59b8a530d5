"""Artifacts (`track_files`): what files somewhere else were, by path and hash; the files themselves stay there."""

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
    """Record an artifact by its hash; one that is there stays as it is."""
    db.execute("INSERT OR IGNORE INTO artifact VALUES (?, ?, ?, NULL)", (project.id, digest, size))
    return _answer(db, project, digest)


def describe(db: sqlite3.Connection, project: Project, digest: str, files: ArtifactFiles) -> dict[str, Any]:
    """Record an artifact's files."""
    db.execute(
        "UPDATE artifact SET files = ? WHERE project = ? AND hash = ?", (json.dumps(files), project.id, digest)
    )
    return _answer(db, project, digest)


def extend(db: sqlite3.Connection, project: Project, digest: str, files: ArtifactFiles) -> dict[str, Any]:
    """Record the artifact that one becomes with further files; of one path the newer file counts."""
    merged = {one["filePath"]: one for one in [*list_files(db, project, digest), *files]}
    ordered = [merged[path] for path in sorted(merged)]
    text = "".join(f"{one['filePath']}\0{one['fileHash']}\0" for one in ordered)
    grown = hashlib.sha256(text.encode()).hexdigest()
    size = sum(one.get("size") or 0 for one in ordered)
    db.execute(
        "INSERT OR IGNORE INTO artifact VALUES (?, ?, ?, ?)", (project.id, grown, size, json.dumps(ordered))
    )
    return _answer(db, project, grown)


def list_files(db: sqlite3.Connection, project: Project, digest: str) -> list[Mapping[str, Any]]:
    """Return an artifact's files.

    Raises:
        ApiError: 404, there is no such artifact.
    """
    files: list[Mapping[str, Any]] = json.loads(_find(db, project, digest)["files"] or "[]")
    return files


def _answer(db: sqlite3.Connection, project: Project, digest: str) -> dict[str, Any]:
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
        raise ApiError(404, "Artifact not found", kind="ARTIFACT_NOT_FOUND", detail=digest)
    return row
