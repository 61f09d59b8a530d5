"""Fields of models and versions: what may be written to them, and how they are read."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from deployments.neptune_server.containers import STAGES, Container, iso_time, now
from deployments.neptune_server.errors import ApiError, FieldError, bad_request

# The client cuts strings at this many characters, so a longer one comes from somewhere else.
LONGEST_STRING = 16_384
# The server's own: a client that writes them is mistaken.
READ_ONLY = frozenset(
    f"sys/{name}"
    for name in ("id", "model_id", "owner", "creation_time", "modification_time", "ping_time", "trashed", "size")
)
_ASSIGNED = {
    "assignFloat": "float",
    "assignInt": "int",
    "assignBool": "bool",
    "assignString": "string",
    "assignDatetime": "datetime",
    "assignArtifact": "artifact",
}
_ACCEPTED: dict[str, type | tuple[type, ...]] = {"assignFloat": (int, float), "assignInt": int, "assignBool": bool}
_SETS = ("insertStrings", "removeStrings", "clearStringSet")
_SERIES = {"logFloats": "floatSeries", "logStrings": "stringSeries"}
_CLEARED = {"clearFloatSeries": "floatSeries", "clearStringSeries": "stringSeries"}


def execute(db: sqlite3.Connection, container: Container, operations: Sequence[Mapping[str, Any]]) -> list[str]:
    """Write fields, in order; what one field cannot take does not keep the others from being written.

    Returns:
        What could not be written, one line each.
    """
    errors = []
    for operation in operations:
        names = [name for name in operation if name != "path"]
        if len(names) != 1 or not operation.get("path"):
            raise bad_request(f"An operation has a path and one thing to do; found {sorted(operation)}.")
        try:
            _execute(db, container, operation["path"], names[0], operation[names[0]] or {})
        except FieldError as error:
            errors.append(str(error))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise bad_request(f"{names[0]} of {operation['path']!r}: {type(error).__name__}: {error}.") from error
    touch(db, container)
    return errors


def touch(db: sqlite3.Connection, container: Container) -> None:
    """Note that something was written."""
    _put(db, container, "sys/modification_time", "datetime", now())


def check_type(db: sqlite3.Connection, container: Container, path: str, kind: str) -> None:
    """Refuse what would change a field's type.

    Raises:
        FieldError: the field has another type.
    """
    found = _find(db, container, path)
    if found is not None and found["type"] != kind:
        raise FieldError(f"Field {path!r} is of type {found['type']}; {kind} was written. Delete it first.")


def read(db: sqlite3.Connection, container: Container, path: str, kind: str) -> dict[str, Any]:
    """Return one field as the API has it.

    Raises:
        ApiError: 404, there is none of that type.
    """
    row = _find(db, container, path)
    if row is None or row["type"] != kind:
        raise no_field(container, path)
    return properties(row["type"], row["value"])


def read_all(db: sqlite3.Connection, container_id: str) -> list[dict[str, Any]]:
    """Return all fields as the API has them, by name."""
    rows = db.execute("SELECT * FROM attribute WHERE container = ? ORDER BY path", (container_id,))
    return [attribute(row) for row in rows]


def read_points(
    db: sqlite3.Connection, container: Container, path: str, *, offset: int, limit: int
) -> dict[str, Any]:
    """Return points of a series, oldest first, and how many there are."""
    row = _find(db, container, path)
    if row is None or row["type"] not in _SERIES.values():
        raise no_field(container, path)
    where = "FROM point WHERE container = ? AND path = ?"
    total = db.execute(f"SELECT COUNT(*) AS n {where}", (container.id, path)).fetchone()["n"]
    rows = db.execute(
        f"SELECT timestamp_ms, step, value {where} ORDER BY position LIMIT ? OFFSET ?",
        (container.id, path, limit, offset),
    )
    values = [{"timestampMillis": one["timestamp_ms"], "step": one["step"], "value": one["value"]} for one in rows]
    return {"totalItemCount": total, "values": values}


def attribute(row: sqlite3.Row) -> dict[str, Any]:
    """Return a row of the table `attribute` as the API has it."""
    kind, path = row["type"], row["path"]
    own = {"attributeName": path, "attributeType": kind, **properties(kind, row["value"])}
    return {"name": path, "type": kind, f"{kind}Properties": own}


def properties(kind: str, value: Any) -> dict[str, Any]:
    """Return a field's value as the API has it."""
    if kind == "stringSet":
        return {"values": json.loads(value)}
    if kind == "file":
        return dict(json.loads(value))
    if kind in _SERIES.values():
        return {"last": value}
    return {{"fileSet": "size", "artifact": "hash"}.get(kind, "value"): bool(value) if kind == "bool" else value}


def no_field(container: Container, path: str) -> ApiError:
    """Return the error for a field that is not there."""
    return ApiError(
        404, "Field not found", kind="ATTRIBUTE_NOT_FOUND", detail=f"{container.short_id} has no such {path!r}."
    )


def put_file_field(db: sqlite3.Connection, container: Container, path: str, kind: str, value: Any) -> None:
    """Write a field whose files are kept already."""
    _put(db, container, path, kind, value)
    db.execute(
        "UPDATE attribute SET value = (SELECT CAST(COALESCE(SUM(size), 0) AS REAL) FROM file WHERE container = ?) "
        "WHERE container = ? AND path = 'sys/size'",
        (container.id, container.id),
    )


def _execute(db: sqlite3.Connection, container: Container, path: str, name: str, given: Mapping[str, Any]) -> None:
    if path in READ_ONLY:
        raise FieldError(f"Field {path!r} is the server's own.")
    if name == "deleteAttribute":
        db.execute("DELETE FROM attribute WHERE container = ? AND path = ?", (container.id, path))
    elif name in _ASSIGNED:
        check_type(db, container, path, _ASSIGNED[name])
        value = _assigned(path, name, given)
        if value is not None:
            _put(db, container, path, _ASSIGNED[name], value)
    elif name in _SETS:
        _change_set(db, container, path, name, given)
    elif name in _SERIES:
        _log(db, container, path, _SERIES[name], given["entries"])
    elif name in _CLEARED:
        check_type(db, container, path, _CLEARED[name])
        db.execute("DELETE FROM point WHERE container = ? AND path = ?", (container.id, path))
        _put(db, container, path, _CLEARED[name], None)
    elif name == "clearArtifact":
        check_type(db, container, path, "artifact")
        _put(db, container, path, "artifact", None)
    elif name == "deleteFiles":
        _delete_files(db, container, path, given["filePaths"])
    elif name != "configFloatSeries":  # it says how a chart looks, and there are none
        raise FieldError(f"Field {path!r}: this server has no {name}.")


def _assigned(path: str, name: str, given: Mapping[str, Any]) -> Any:
    if name == "assignDatetime":
        return iso_time(datetime.fromtimestamp(given["valueMilliseconds"] / 1000, UTC))
    value = given["hash" if name == "assignArtifact" else "value"]
    if not isinstance(value, _ACCEPTED.get(name, str)):
        raise TypeError(f"{value!r} is none")
    if path == "sys/stage" and value not in STAGES:
        raise FieldError(f"{value!r} is no stage: use one of {', '.join(STAGES)}.")
    if isinstance(value, str) and len(value) > LONGEST_STRING:
        raise FieldError(
            f"Field {path!r}: {len(value)} characters, at most {LONGEST_STRING}. Upload it as a file."
        )
    if isinstance(value, float) and not math.isfinite(value):
        return None  # as Neptune does: it keeps no NaN and no infinity, and does not complain
    return value


def _change_set(
    db: sqlite3.Connection, container: Container, path: str, name: str, given: Mapping[str, Any]
) -> None:
    check_type(db, container, path, "stringSet")
    found = _find(db, container, path)
    members = set(json.loads(found["value"])) if found is not None and name != "clearStringSet" else set()
    if name == "insertStrings":
        members |= set(given["values"])
    elif name == "removeStrings":
        members -= set(given["values"])
    _put(db, container, path, "stringSet", json.dumps(sorted(members)))


def _log(
    db: sqlite3.Connection, container: Container, path: str, kind: str, entries: Sequence[Mapping[str, Any]]
) -> None:
    check_type(db, container, path, kind)
    if _find(db, container, path) is None:
        _put(db, container, path, kind, None)
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
        _put(db, container, path, kind, value)


def _delete_files(db: sqlite3.Connection, container: Container, path: str, names: Sequence[str]) -> None:
    check_type(db, container, path, "fileSet")
    for name in names:
        db.execute(
            "DELETE FROM file WHERE container = ? AND path = ? AND (sub_path = ? OR substr(sub_path, 1, ?) = ?)",
            (container.id, path, name, len(name) + 1, f"{name}/"),
        )
    put_file_field(db, container, path, "fileSet", set_size(db, container, path))


def set_size(db: sqlite3.Connection, container: Container, path: str) -> int:
    """Return the size of all files of a file set, in bytes."""
    row = db.execute(
        "SELECT COALESCE(SUM(size), 0) AS size FROM file WHERE container = ? AND path = ?", (container.id, path)
    ).fetchone()
    return int(row["size"])


def _find(db: sqlite3.Connection, container: Container, path: str) -> sqlite3.Row | None:
    row: sqlite3.Row | None = db.execute(
        "SELECT * FROM attribute WHERE container = ? AND path = ?", (container.id, path)
    ).fetchone()
    return row


def _put(db: sqlite3.Connection, container: Container, path: str, kind: str, value: Any) -> None:
    # Not INSERT OR REPLACE: that would delete the row, and with it the field's points and files.
    db.execute(
        "INSERT INTO attribute VALUES (?, ?, ?, ?) "
        "ON CONFLICT(container, path) DO UPDATE SET type = excluded.type, value = excluded.value",
        (container.id, path, kind, value),
    )
