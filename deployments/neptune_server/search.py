"""Table queries: which models or versions of a project match, sorted, a page at a time, with which columns."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any

from deployments.neptune_server.containers import Project
from deployments.neptune_server.errors import bad_request
from deployments.neptune_server.fields import attribute
from deployments.neptune_server.nql import compile_query

TYPES = ("model", "modelVersion")
# As the hosted service had it; the client goes on from there by the last value.
_LARGEST_PAGE = 10_000
# Columns that every model and version has; the client asks for them in an empty project, too.
_ALWAYS = {
    "sys/id": "string",
    "sys/name": "string",
    "sys/creation_time": "datetime",
    "sys/modification_time": "datetime",
    "sys/ping_time": "datetime",
    "sys/size": "float",
    "sys/trashed": "bool",
    "sys/stage": "string",
    "sys/model_id": "string",
}


def search(
    db: sqlite3.Connection, project: Project, types: Sequence[str], given: dict[str, Any]
) -> dict[str, Any]:
    """Return one page of a table.

    Args:
        db: To read from.
        project: Whose models and versions.
        types: "model", "modelVersion", or both.
        given: The request: `query` (NQL), `sorting`, `pagination`, `attributeFilters` (columns; none: all).
    """
    condition = compile_query((given.get("query") or {}).get("query") or "")
    sorting = given.get("sorting") or {"sortBy": {"name": "sys/creation_time"}, "dir": "descending"}
    page = given.get("pagination") or {}
    limit, offset = int(page.get("limit", 100)), int(page.get("offset", 0))
    if not (0 <= limit <= _LARGEST_PAGE and offset >= 0):
        raise bad_request(f"A page is of 0 to {_LARGEST_PAGE} entries from 0 on; asked: {limit} from {offset}.")
    kinds = _types(types)
    where = f"c.project = ? AND c.type IN ({', '.join('?' * len(kinds))}) AND {condition.sql}"
    values = (project.id, *kinds, *condition.values)
    count = f"SELECT COUNT(*) AS n FROM container c WHERE {where}"  # noqa: S608 - of our own pieces
    total = db.execute(count, values).fetchone()["n"]
    way = "ASC" if sorting.get("dir") == "ascending" else "DESC"
    # Who has no such field comes last either way; of two alike, the newer counts as greater.
    rows = db.execute(
        "SELECT c.id FROM container c LEFT JOIN attribute s ON s.container = c.id AND s.path = ? "  # noqa: S608
        f"WHERE {where} ORDER BY s.value IS NULL, s.value {way}, c.number {way} LIMIT ? OFFSET ?",
        (sorting["sortBy"]["name"], *values, limit, offset),
    )
    columns = {one["path"] for one in given.get("attributeFilters") or ()}
    entries = [{"experimentId": row["id"], "attributes": _attributes(db, row["id"], columns)} for row in rows]
    return {"matchingItemCount": total, "totalItemCount": total, "entries": entries}


def column_types(
    db: sqlite3.Connection, project: Project, types: Sequence[str], column: str
) -> list[dict[str, str]]:
    """Return which types a column has in a project's models or versions."""
    kinds = _types(types)
    rows = db.execute(
        "SELECT DISTINCT a.type FROM attribute a JOIN container c ON c.id = a.container "  # noqa: S608
        f"WHERE c.project = ? AND a.path = ? AND c.type IN ({', '.join('?' * len(kinds))})",
        (project.id, column, *kinds),
    )
    found = {row["type"] for row in rows} | ({_ALWAYS[column]} if column in _ALWAYS else set())
    return [{"name": column, "type": kind} for kind in sorted(found)]


def _types(types: Sequence[str]) -> Sequence[str]:
    unknown = set(types) - {*TYPES, "run", "project"}
    if unknown:
        raise bad_request(f"Unknown types {sorted(unknown)}; there are {', '.join(TYPES)}.")
    return types or TYPES


def _attributes(db: sqlite3.Connection, container: str, columns: set[str]) -> list[dict[str, Any]]:
    rows = db.execute("SELECT * FROM attribute WHERE container = ? ORDER BY path", (container,))
    return [attribute(row) for row in rows if not columns or row["path"] in columns]
