"""Table queries: the models or versions of a project that match a query, sorted, one page at a time."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any

from deployments.neptune_server.containers import SYSTEM_FIELDS, Project
from deployments.neptune_server.errors import bad_request
from deployments.neptune_server.fields import read_all
from deployments.neptune_server.nql import compile_query

# The limit of the hosted service. For more entries, the client adds a condition on the last value.
_MAX_PAGE = 10_000


def search(
    db: sqlite3.Connection, project: Project, types: Sequence[str], request: dict[str, Any]
) -> dict[str, Any]:
    """Return one page of a table.

    Args:
        db: Connection to read from.
        project: Project whose models and versions are searched.
        types: Types of container: "model", "modelVersion". The server has no others.
        request: The client's request: `query` in NQL, `sorting`, `pagination`, and `attributeFilters`, the columns
            of the table. Without columns, the table has all fields.
    """
    condition = compile_query((request.get("query") or {}).get("query") or "")
    sorting = request.get("sorting") or {"sortBy": {"name": "sys/creation_time"}, "dir": "descending"}
    page = request.get("pagination") or {}
    limit, offset = int(page.get("limit", 100)), int(page.get("offset", 0))
    if not (0 <= limit <= _MAX_PAGE and offset >= 0):
        raise bad_request(f"Expected a page of 0 to {_MAX_PAGE} entries, got limit {limit} and offset {offset}.")
    # The plus keeps SQLite from beginning with every object of the project.
    where = f"+c.project = ? AND c.type IN ({', '.join('?' * len(types))}) AND {condition.sql}"
    values = (project.id, *types, *condition.values)
    count = f"SELECT COUNT(*) AS n FROM container c WHERE {where}"  # noqa: S608 - no text of the client
    total = db.execute(count, values).fetchone()["n"]
    direction = "ASC" if sorting.get("dir") == "ascending" else "DESC"
    # Entries without the field come last in both directions. Of equal values, the newer one counts as greater.
    rows = db.execute(
        "SELECT c.id FROM container c LEFT JOIN attribute s ON s.container = c.id AND s.path = ? "  # noqa: S608
        f"WHERE {where} ORDER BY s.value IS NULL, s.value {direction}, c.number {direction} LIMIT ? OFFSET ?",
        (sorting["sortBy"]["name"], *values, limit, offset),
    )
    columns = frozenset(column["path"] for column in request.get("attributeFilters") or ())
    entries = [{"experimentId": row["id"], "attributes": read_all(db, row["id"], columns)} for row in rows]
    return {"matchingItemCount": total, "entries": entries}


def column_types(db: sqlite3.Connection, project: Project, types: Sequence[str], column: str) -> list[str]:
    """Return the types of a column in a project's models or versions."""
    rows = db.execute(
        "SELECT DISTINCT a.type FROM attribute a JOIN container c ON c.id = a.container "  # noqa: S608
        f"WHERE c.project = ? AND a.path = ? AND c.type IN ({', '.join('?' * len(types))})",
        (project.id, column, *types),
    )
    field_types = {row["type"] for row in rows}
    # The client sorts by a system field even in an empty project.
    if column in SYSTEM_FIELDS:
        field_types.add(SYSTEM_FIELDS[column])
    return sorted(field_types)
