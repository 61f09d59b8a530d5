"""Projects, models and model versions: made, found, moved to the trash, deleted."""

from __future__ import annotations

import re
import sqlite3
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from deployments.neptune_server.errors import ApiError, bad_request

STAGES = ("none", "staging", "production", "archived")
# Neptune's: what a model's key may be.
_KEY = re.compile(r"[A-Z][A-Z0-9]{0,127}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class Project:
    """A project of a workspace; `key` begins the ids of all that is in it."""

    id: str
    workspace: str
    name: str
    key: str

    def answer(self) -> dict[str, object]:
        """Return it as the API has it."""
        return {
            "id": self.id,
            "organizationName": self.workspace,
            "name": self.name,
            "projectKey": self.key,
            "version": 2,
        }


@dataclass(frozen=True)
class Container:
    """What fields belong to: a project, a model or a model version. The API calls it an experiment."""

    id: str
    project: Project
    type: str
    short_id: str
    trashed: bool

    def answer(self) -> dict[str, object]:
        """Return it as the API has it."""
        return {
            "id": self.id,
            "type": self.type,
            "shortId": self.short_id,
            "organizationName": self.project.workspace,
            "projectName": self.project.name,
            "trashed": self.trashed,
        }


def now() -> str:
    """Return the time, UTC, in the form that the client reads: with milliseconds and a Z."""
    return iso_time(datetime.now(UTC))


def iso_time(moment: datetime) -> str:
    """Return a time in UTC; such texts sort as the times do."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


def make_project(db: sqlite3.Connection, qualified: str, *, key: str | None = None) -> Project:
    """Make the project "workspace/name".

    Raises:
        ApiError: 400, the name is no such name, or the key is taken; 409, the project is there already.
    """
    workspace, _, name = qualified.partition("/")
    if not (_NAME.fullmatch(workspace) and _NAME.fullmatch(name)):
        raise bad_request(f"{qualified!r} is no project: write workspace/name, of letters, digits, '.', '_', '-'.")
    taken = {row["key"] for row in db.execute("SELECT key FROM project WHERE workspace = ?", (workspace,))}
    if key is None:
        stem = (re.sub(r"[^A-Z0-9]", "", name.upper()).lstrip("0123456789") or "PRJ")[:3]
        key = next(one for one in (stem, *(f"{stem}{n}" for n in range(2, len(taken) + 3))) if one not in taken)
    elif not _KEY.fullmatch(key):
        raise ApiError(400, "Invalid project key", kind="PROJECT_KEY_INVALID", detail=f"{key!r}: use A-Z and 0-9.")
    elif key in taken:
        raise ApiError(409, "Project key taken", kind="PROJECT_KEY_COLLISION", detail=key)
    project = Project(str(uuid.uuid4()), workspace, name, key)
    try:
        db.execute("INSERT INTO project VALUES (?, ?, ?, ?)", (project.id, workspace, name, key))
    except sqlite3.IntegrityError as error:
        raise ApiError(409, "Project exists", kind="PROJECT_NAME_COLLISION", detail=qualified) from error
    _insert(db, Container(project.id, project, "project", key, False), parent="", own={"id": key, "name": name})
    return project


def find_project(db: sqlite3.Connection, identifier: str) -> Project:
    """Return a project by its id or as "workspace/name".

    Raises:
        ApiError: 404, there is none.
    """
    row = db.execute(
        "SELECT * FROM project WHERE id = ? OR workspace || '/' || name = ?", (identifier, identifier)
    ).fetchone()
    if row is None:
        raise ApiError(
            404,
            "Project not found",
            kind="PROJECT_NOT_FOUND",
            detail=f"There is no project {identifier!r}; make it with --project or management.create_project.",
        )
    return Project(**row)


def list_projects(db: sqlite3.Connection, workspace: str | None) -> list[Project]:
    """Return the projects of one workspace, or of all, newest first."""
    where, values = ("WHERE workspace = ? ", (workspace,)) if workspace else ("", ())
    return [Project(**row) for row in db.execute(f"SELECT * FROM project {where}ORDER BY rowid DESC", values)]  # noqa: S608 - constant text


def make_model(db: sqlite3.Connection, project: Project, key: str) -> Container:
    """Make a model.

    Raises:
        ApiError: 400, the key is no key; 409, the project has a model of that key, in its trash perhaps.
    """
    if not _KEY.fullmatch(key):
        raise bad_request(f"{key!r} is no model key: write A-Z and 0-9, a letter first.")
    model = Container(str(uuid.uuid4()), project, "model", f"{project.key}-{key}", False)
    try:
        _insert(db, model, parent=project.id, own={"id": model.short_id})
    except sqlite3.IntegrityError as error:
        raise ApiError(409, "Model key taken", kind="MODEL_KEY_COLLISION", detail=model.short_id) from error
    return model


def make_model_version(db: sqlite3.Connection, project: Project, model_id: str) -> Container:
    """Make the next version of a model.

    Raises:
        ApiError: 400, `model_id` is no model of that project; 404, it is nothing at all.
    """
    model = find_container(db, model_id)
    if model.type != "model" or model.project != project:
        raise bad_request(f"{model.short_id} is no model of {project.workspace}/{project.name}.")
    # Counted, so that no number comes again when the last version is deleted.
    row = db.execute("UPDATE container SET children = children + 1 WHERE id = ? RETURNING children", (model.id,))
    short_id = f"{model.short_id}-{row.fetchone()['children']}"
    version = Container(str(uuid.uuid4()), project, "modelVersion", short_id, False)
    own = {"id": short_id, "model_id": model.short_id, "stage": STAGES[0]}
    _insert(db, version, parent=model.id, own=own)
    return version


def find_container(db: sqlite3.Connection, identifier: str) -> Container:
    """Return what has that id, or is "workspace/project/SHORT-ID".

    Raises:
        ApiError: 404, there is nothing.
    """
    row = db.execute("SELECT * FROM container WHERE id = ?", (identifier,)).fetchone()
    if row is None and identifier.count("/") == 2:
        row = db.execute(
            "SELECT c.* FROM container c JOIN project p ON p.id = c.project "
            "WHERE p.workspace = ? AND p.name = ? AND c.short_id = ?",
            identifier.split("/"),
        ).fetchone()
    if row is None:
        raise ApiError(404, "Not found", kind="EXPERIMENT_NOT_FOUND", detail=f"There is no {identifier!r}.")
    trashed = db.execute(
        "SELECT value FROM attribute WHERE container = ? AND path = 'sys/trashed'", (row["id"],)
    ).fetchone()["value"]
    return Container(row["id"], find_project(db, row["project"]), row["type"], row["short_id"], bool(trashed))


def trash(db: sqlite3.Connection, project: Project, identifiers: Sequence[str]) -> tuple[list[str], list[str]]:
    """Move models and versions to the trash, a model with its versions; return ids moved and what failed."""
    found, errors = _of_project(db, project, identifiers)
    for container in found:
        db.execute(
            "UPDATE attribute SET value = 1 WHERE path = 'sys/trashed' AND container IN "
            "(SELECT id FROM container WHERE id = ? OR parent = ?)",
            (container.id, container.id),
        )
    return [container.id for container in found], errors


def delete(db: sqlite3.Connection, project: Project, identifiers: Sequence[str]) -> tuple[list[str], list[str]]:
    """Delete what is in the trash, a model with its versions; return ids deleted and what failed."""
    found, errors = _of_project(db, project, identifiers)
    errors += [f"{one.short_id} is not in the trash: trash it first." for one in found if not one.trashed]
    gone = [one for one in found if one.trashed]
    db.executemany("DELETE FROM container WHERE id = ? OR parent = ?", [(one.id, one.id) for one in gone])
    return [one.id for one in gone], errors


def trashed_ids(db: sqlite3.Connection, project: Project) -> list[str]:
    """Return the ids of all that is in a project's trash, versions before their models."""
    rows = db.execute(
        "SELECT c.id FROM container c JOIN attribute a ON a.container = c.id AND a.path = 'sys/trashed' "
        "WHERE c.project = ? AND a.value = 1 ORDER BY c.type = 'model', c.number",
        (project.id,),
    )
    return [row["id"] for row in rows]


def _of_project(
    db: sqlite3.Connection, project: Project, identifiers: Sequence[str]
) -> tuple[list[Container], list[str]]:
    found, errors = [], []
    for identifier in identifiers:
        try:
            container = find_container(db, identifier)
        except ApiError as error:
            errors.append(error.detail)
            continue
        if container.project == project and container.type != "project":
            found.append(container)
        else:
            errors.append(f"{identifier!r} is no model or version of {project.workspace}/{project.name}.")
    return found, errors


def _insert(db: sqlite3.Connection, made: Container, *, parent: str, own: dict[str, str]) -> None:
    db.execute(
        "INSERT INTO container(id, project, parent, type, short_id) VALUES (?, ?, ?, ?, ?)",
        (made.id, made.project.id, parent, made.type, made.short_id),
    )
    at = now()
    fields: list[tuple[str, str, object]] = [
        ("name", "string", "Untitled"),
        ("owner", "string", "registry"),
        ("creation_time", "datetime", at),
        ("modification_time", "datetime", at),
        ("ping_time", "datetime", at),
        ("trashed", "bool", 0),
        ("state", "experimentState", "running"),
        ("size", "float", 0.0),
        ("tags", "stringSet", "[]"),
        *((name, "string", value) for name, value in own.items()),
    ]
    db.executemany(
        "INSERT OR REPLACE INTO attribute VALUES (?, ?, ?, ?)",
        [(made.id, f"sys/{name}", kind, value) for name, kind, value in fields],
    )
