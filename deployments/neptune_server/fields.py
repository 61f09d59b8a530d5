"""Fields of models and versions: which values they take, and how the client reads them."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from deployments.neptune_server.containers import STAGES, SYSTEM_FIELDS, Container, iso_time, now
from deployments.neptune_server.errors import ApiError, FieldError, bad_request

# The client cuts strings at this number of characters.
MAX_STRING_LENGTH = 16_384
_READ_ONLY = SYSTEM_FIELDS.keys() - {"sys/name", "sys/tags", "sys/stage"}
_ASSIGNMENTS = {
    "assignFloat": "float",
    "assignInt": "int",
    "assignBool": "bool",
    "assignString": "string",
    "assignDatetime": "datetime",
    "assignArtifact": "artifact",
}
_PYTHON_TYPES: dict[str, type | tuple[type, ...]] = {
    "assignFloat": (int, float),
    "assignInt": int,
    "assignBool": bool,
}
_SET_CHANGES = ("insertStrings", "removeStrings", "clearStringSet")
_LOGS = {"logFloats": "floatSeries", "logStrings": "stringSeries"}
_CLEARS = {"clearFloatSeries": "floatSeries", "clearStringSeries": "stringSeries"}


def execute(db: sqlite3.Connection, container: Container, operations: Sequence[Mapping[str, Any]]) -> list[str]:
    """Write fields in order. A field that cannot take its value does not stop the others.

    Returns:
        An error message for each operation that failed.
    """
    errors = []
    for operation in operations:
        names = [name for name in operation if name != "path"]
        if len(names) != 1 or not operation.get("path"):
            raise bad_request(f"An operation has a path and one action, got {sorted(operation)}.")
        try:
            _execute(db, container, operation["path"], names[0], operation[names[0]] or {})
        except FieldError as error:
            errors.append(str(error))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise bad_request(f"{names[0]} of {operation['path']!r}: {type(error).__name__}: {error}.") from error
    touch(db, container)
    return errors


def touch(db: sqlite3.Connection, container: Container) -> None:
    """Set the time at which the container was last changed."""
    put(db, container, "sys/modification_time", "datetime", now())


def check_type(db: sqlite3.Connection, container: Container, path: str, field_type: str) -> None:
    """Check that a write does not change the type of a field.

    Raises:
        FieldError: The field has another type.
    """
    row = _find(db, container, path)
    if row is not None and row["type"] != field_type:
        raise FieldError(f"Field {path!r}: expected type {row['type']}, got {field_type}. Delete the field first.")


def read(db: sqlite3.Connection, container: Container, path: str, field_type: str) -> dict[str, Any]:
    """Return the value of a field in the form of the API.

    Raises:
        ApiError: 404, the container has no such field of that type.
    """
    row = _find(db, container, path)
    if row is None or row["type"] != field_type:
        raise no_field(container, path)
    return _properties(field_type, row["value"])


def read_all(
    db: sqlite3.Connection, container_id: str, paths: frozenset[str] = frozenset()
) -> list[dict[str, Any]]:
    """Return fields in the form of the API, by name: those at `paths`, or all fields if `paths` is empty."""
    chosen = f"AND path IN ({', '.join('?' * len(paths))}) " if paths else ""
    rows = db.execute(
        f"SELECT * FROM attribute WHERE container = ? {chosen}ORDER BY path",  # noqa: S608 - question marks
        (container_id, *paths),
    )
    return [
        {
            "name": row["path"],
            "type": row["type"],
            f"{row['type']}Properties": _properties(row["type"], row["value"]),
        }
        for row in rows
    ]


def read_points(
    db: sqlite3.Connection, container: Container, path: str, *, offset: int, limit: int
) -> dict[str, Any]:
    """Return points of a series, oldest first, and the number of all its points.

    Raises:
        ApiError: 404, the container has no such series.
    """
    row = _find(db, container, path)
    if row is None or row["type"] not in _LOGS.values():
        raise no_field(container, path)
    where = "FROM point WHERE container = ? AND path = ?"
    total = db.execute(f"SELECT COUNT(*) AS n {where}", (container.id, path)).fetchone()["n"]
    rows = db.execute(
        f"SELECT timestamp_ms, step, value {where} ORDER BY position LIMIT ? OFFSET ?",
        (container.id, path, limit, offset),
    )
    values = [{"timestampMillis": row["timestamp_ms"], "step": row["step"], "value": row["value"]} for row in rows]
    return {"totalItemCount": total, "values": values}


def no_field(container: Container, path: str) -> ApiError:
    """Return the error for a field that does not exist or has another type."""
    return ApiError(404, "Field not found", detail=f"{container.short_id} has no field {path!r} of that type.")


def put(db: sqlite3.Connection, container: Container, path: str, field_type: str, value: Any) -> None:
    """Write a field of any type."""
    # INSERT OR REPLACE would delete the row, and with it the field's points and files.
    db.execute(
        "INSERT INTO attribute VALUES (?, ?, ?, ?) "
        "ON CONFLICT(container, path) DO UPDATE SET type = excluded.type, value = excluded.value",
        (container.id, path, field_type, value),
    )


def put_file_field(db: sqlite3.Connection, container: Container, path: str, field_type: str, value: Any) -> None:
    """Write a field that has files, and update the size of the container."""
    put(db, container, path, field_type, value)
    db.execute(
        "UPDATE attribute SET value = (SELECT CAST(COALESCE(SUM(size), 0) AS REAL) FROM file WHERE container = ?) "
        "WHERE container = ? AND path = 'sys/size'",
        (container.id, container.id),
    )


def set_size(db: sqlite3.Connection, container: Container, path: str) -> int:
    """Return the size of all files of a file set, in bytes."""
    row = db.execute(
        "SELECT COALESCE(SUM(size), 0) AS size FROM file WHERE container = ? AND path = ?", (container.id, path)
    ).fetchone()
    return int(row["size"])


def _properties(field_type: str, value: Any) -> dict[str, Any]:
    match field_type:
        case "bool":
            return {"value": bool(value)}
        case "stringSet":
            return {"values": json.loads(value)}
        case "floatSeries" | "stringSeries":
            return {"last": value}
        case "file":
            return dict(json.loads(value))
        case "fileSet":
            return {"size": value}
        case "artifact":
            return {"hash": value}
    return {"value": value}


def _execute(
    db: sqlite3.Connection, container: Container, path: str, action: str, arguments: Mapping[str, Any]
) -> None:
    if path in _READ_ONLY:
        raise FieldError(f"Field {path!r} is read-only: the server sets it.")
    if action == "deleteAttribute":
        db.execute("DELETE FROM attribute WHERE container = ? AND path = ?", (container.id, path))
    elif action in _ASSIGNMENTS:
        check_type(db, container, path, _ASSIGNMENTS[action])
        value = _assigned_value(path, action, arguments)
        if value is not None:
            put(db, container, path, _ASSIGNMENTS[action], value)
    elif action in _SET_CHANGES:
        _change_set(db, container, path, action, arguments)
    elif action in _LOGS:
        _log(db, container, path, _LOGS[action], arguments["entries"])
    elif action in _CLEARS:
        check_type(db, container, path, _CLEARS[action])
        db.execute("DELETE FROM point WHERE container = ? AND path = ?", (container.id, path))
        put(db, container, path, _CLEARS[action], None)
    elif action == "deleteFiles":
        _delete_files(db, container, path, arguments["filePaths"])
    elif action != "configFloatSeries":  # the settings of a chart, which this server does not draw
        raise FieldError(f"Field {path!r}: this server does not support {action}.")


def _assigned_value(path: str, action: str, arguments: Mapping[str, Any]) -> Any:
    """Return the value to store, or None if there is nothing to store."""
    if action == "assignDatetime":
        return iso_time(datetime.fromtimestamp(arguments["valueMilliseconds"] / 1000, UTC))
    value = arguments["hash" if action == "assignArtifact" else "value"]
    if not isinstance(value, _PYTHON_TYPES.get(action, str)):
        raise TypeError(f"expected {_ASSIGNMENTS[action]}, got {value!r}")
    if path == "sys/stage" and value not in STAGES:
        raise FieldError(f"{value!r} is not a stage. Use one of {', '.join(STAGES)}.")
    if isinstance(value, str) and len(value) > MAX_STRING_LENGTH:
        raise FieldError(
            f"Field {path!r}: expected at most {MAX_STRING_LENGTH} characters, got {len(value)}. "
            "Upload the text as a file."
        )
    # Neptune drops NaN and infinities without an error.
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _change_set(
    db: sqlite3.Connection, container: Container, path: str, action: str, arguments: Mapping[str, Any]
) -> None:
    check_type(db, container, path, "stringSet")
    row = _find(db, container, path)
    members = set(json.loads(row["value"])) if row is not None and action != "clearStringSet" else set()
    if action == "insertStrings":
        members |= set(arguments["values"])
    elif action == "removeStrings":
        members -= set(arguments["values"])
    put(db, container, path, "stringSet", json.dumps(sorted(members)))


def _log(
    db: sqlite3.Connection, container: Container, path: str, field_type: str, entries: Sequence[Mapping[str, Any]]
) -> None:
    check_type(db, container, path, field_type)
    if _find(db, container, path) is None:
        put(db, container, path, field_type, None)
    row = db.execute(
        "SELECT step FROM point WHERE container = ? AND path = ? ORDER BY position DESC LIMIT 1",
        (container.id, path),
    ).fetchone()
    step = -1.0 if row is None else row["step"]
    for entry in entries:
        value = entry["value"]
        if isinstance(value, float) and not math.isfinite(value):
            continue
        step = step + 1 if entry.get("step") is None else entry["step"]
        db.execute(
            "INSERT INTO point(container, path, step, timestamp_ms, value) VALUES (?, ?, ?, ?, ?)",
            (container.id, path, step, entry["timestampMilliseconds"], value),
        )
        put(db, container, path, field_type, value)


def _delete_files(db: sqlite3.Connection, container: Container, path: str, names: Sequence[str]) -> None:
    check_type(db, container, path, "fileSet")
    for name in names:
        db.execute(
            "DELETE FROM file WHERE container = ? AND path = ? AND (sub_path = ? OR substr(sub_path, 1, ?) = ?)",
            (container.id, path, name, len(name) + 1, f"{name}/"),
        )
    put_file_field(db, container, path, "fileSet", set_size(db, container, path))


def _find(db: sqlite3.Connection, container: Container, path: str) -> sqlite3.Row | None:
    row: sqlite3.Row | None = db.execute(
        "SELECT * FROM attribute WHERE container = ? AND path = ?", (container.id, path)
    ).fetchone()
    return row
