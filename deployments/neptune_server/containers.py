"""Projects, models and model versions: how the server creates, finds, trashes and deletes them."""

from __future__ import annotations

import re
import sqlite3
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from deployments.neptune_server.errors import ApiError, bad_request

STAGES = ("none", "staging", "production", "archived")
# Fields that the server sets itself, with their types.
SYSTEM_FIELDS = {
    "sys/id": "string",
    "sys/name": "string",
    "sys/owner": "string",
    "sys/creation_time": "datetime",
    "sys/modification_time": "datetime",
    "sys/ping_time": "datetime",
    "sys/trashed": "bool",
    "sys/state": "experimentState",
    "sys/size": "float",
    "sys/tags": "stringSet",
    "sys/model_id": "string",
    "sys/stage": "string",
}
# Neptune's rule for the key of a project or a model.
_KEY = re.compile(r"[A-Z][A-Z0-9]{0,127}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class Project:
    """A project in a workspace. The ids of its models and versions begin with its key."""

    id: str
    workspace: str
    name: str
    key: str

    @property
    def qualified_name(self) -> str:
        """The project as "workspace/name"."""
        return f"{self.workspace}/{self.name}"

    def to_json(self) -> dict[str, object]:
        """Return the project in the form of the API."""
        return {
            "id": self.id,
            "organizationName": self.workspace,
            "name": self.name,
            "projectKey": self.key,
            "version": 2,
        }


@dataclass(frozen=True)
class Container:
    """An object with fields: a project, a model or a model version. The API calls it an experiment."""

    id: str
    project: Project
    type: str
    short_id: str
    trashed: bool

    def to_json(self) -> dict[str, object]:
        """Return the container in the form of the API."""
        return {
            "id": self.id,
            "type": self.type,
            "shortId": self.short_id,
            "organizationName": self.project.workspace,
            "projectName": self.project.name,
            "trashed": self.trashed,
        }


def now() -> str:
    """Return the current time in the form that `iso_time` returns."""
    return iso_time(datetime.now(UTC))


def iso_time(moment: datetime) -> str:
    """Return a time as the client parses it: in UTC, with milliseconds and a Z. Such texts sort like the times."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


def create_project(db: sqlite3.Connection, qualified_name: str, *, key: str | None = None) -> Project:
    """Create the project "workspace/name".

    Raises:
        ApiError: 400, the name or the key is invalid; 409, the name or the key is taken.
    """
    workspace, _, name = qualified_name.partition("/")
    if not (_NAME.fullmatch(workspace) and _NAME.fullmatch(name)):
        raise bad_request(
            f"{qualified_name!r} is not a project name. "
            "Use workspace/name, both made of letters, digits, '.', '_' and '-'."
        )
    rows = db.execute("SELECT key FROM project WHERE workspace = ?", (workspace,))
    taken_keys = {row["key"] for row in rows}
    if key is None:
        stem = (re.sub(r"[^A-Z0-9]", "", name.upper()).lstrip("0123456789") or "PRJ")[:3]
        candidates = (stem, *(f"{stem}{number}" for number in range(2, len(taken_keys) + 3)))
        key = next(candidate for candidate in candidates if candidate not in taken_keys)
    elif not _KEY.fullmatch(key):
        raise ApiError(
            400,
            "Invalid project key",
            kind="PROJECT_KEY_INVALID",
            detail=f"{key!r} is not a project key. Use A-Z and 0-9, with a letter first.",
        )
    elif key in taken_keys:
        raise ApiError(
            409,
            "Project key taken",
            kind="PROJECT_KEY_COLLISION",
            detail=f"{workspace} has a project with the key {key!r}. Choose another key.",
        )
    project = Project(str(uuid.uuid4()), workspace, name, key)
    try:
        db.execute("INSERT INTO project VALUES (?, ?, ?, ?)", (project.id, workspace, name, key))
    except sqlite3.IntegrityError as error:
        raise ApiError(
            409,
            "Project exists",
            kind="PROJECT_NAME_COLLISION",
            detail=f"The project {qualified_name} exists. Choose another name.",
        ) from error
    container = Container(project.id, project, "project", key, False)
    _insert(db, container, parent="", values={"sys/id": key, "sys/name": name})
    return project


def find_project(db: sqlite3.Connection, identifier: str) -> Project:
    """Return a project by its id or as "workspace/name".

    Raises:
        ApiError: 404, the project does not exist.
    """
    row = db.execute(
        "SELECT * FROM project WHERE id = ? OR workspace || '/' || name = ?", (identifier, identifier)
    ).fetchone()
    if row is None:
        raise ApiError(
            404,
            "Project not found",
            detail=f"Project {identifier!r} does not exist. Create it: --project or management.create_project.",
        )
    return Project(**row)


def list_projects(db: sqlite3.Connection, workspace: str | None) -> list[Project]:
    """Return the projects of one workspace, or of all workspaces, newest first."""
    where, values = ("WHERE workspace = ? ", (workspace,)) if workspace else ("", ())
    return [Project(**row) for row in db.execute(f"SELECT * FROM project {where}ORDER BY rowid DESC", values)]  # noqa: S608 - constant text


def create_model(db: sqlite3.Connection, project: Project, key: str) -> Container:
    """Create a model.

    Raises:
        ApiError: 400, the key is invalid; 409, the project or its trash has a model with that key.
    """
    if not _KEY.fullmatch(key):
        raise bad_request(f"{key!r} is not a model key. Use A-Z and 0-9, with a letter first.")
    model = Container(str(uuid.uuid4()), project, "model", f"{project.key}-{key}", False)
    try:
        _insert(db, model, parent=project.id, values={"sys/id": model.short_id})
    except sqlite3.IntegrityError as error:
        raise ApiError(
            409,
            "Model key taken",
            detail=f"{project.qualified_name} or its trash has a model {model.short_id}. Choose another key.",
        ) from error
    return model


def create_model_version(db: sqlite3.Connection, project: Project, model_id: str) -> Container:
    """Create the next version of a model.

    Raises:
        ApiError: 400, the container is not a model of that project; 404, the container does not exist.
    """
    model = find_container(db, model_id)
    if model.type != "model" or model.project != project:
        raise bad_request(f"{model.short_id} is not a model of {project.qualified_name}.")
    # A counter, so that a number is not used again after the last version is deleted.
    row = db.execute("UPDATE container SET children = children + 1 WHERE id = ? RETURNING children", (model.id,))
    short_id = f"{model.short_id}-{row.fetchone()['children']}"
    version = Container(str(uuid.uuid4()), project, "modelVersion", short_id, False)
    values = {"sys/id": short_id, "sys/model_id": model.short_id, "sys/stage": STAGES[0]}
    _insert(db, version, parent=model.id, values=values)
    return version


def find_container(db: sqlite3.Connection, identifier: str) -> Container:
    """Return a container by its id or as "workspace/project/SHORT-ID".

    Raises:
        ApiError: 404, the container does not exist.
    """
    row = db.execute("SELECT * FROM container WHERE id = ?", (identifier,)).fetchone()
    if row is None and identifier.count("/") == 2:
        row = db.execute(
            "SELECT c.* FROM container c JOIN project p ON p.id = c.project "
            "WHERE p.workspace = ? AND p.name = ? AND c.short_id = ?",
            identifier.split("/"),
        ).fetchone()
    if row is None:
        raise ApiError(
            404,
            "Not found",
            kind="EXPERIMENT_NOT_FOUND",
            detail=f"A project, model or model version {identifier!r} does not exist.",
        )
    trashed = db.execute(
        "SELECT value FROM attribute WHERE container = ? AND path = 'sys/trashed'", (row["id"],)
    ).fetchone()["value"]
    return Container(row["id"], find_project(db, row["project"]), row["type"], row["short_id"], bool(trashed))


def trash(db: sqlite3.Connection, project: Project, identifiers: Sequence[str]) -> tuple[list[str], list[str]]:
    """Move models and versions to the trash, a model together with its versions.

    Returns:
        The ids of what was moved, and an error message for each identifier that was not.
    """
    containers, errors = _find_in_project(db, project, identifiers)
    for container in containers:
        db.execute(
            "UPDATE attribute SET value = 1 WHERE path = 'sys/trashed' AND container IN "
            "(SELECT id FROM container WHERE id = ? OR parent = ?)",
            (container.id, container.id),
        )
    return [container.id for container in containers], errors


def delete(db: sqlite3.Connection, project: Project, identifiers: Sequence[str]) -> tuple[list[str], list[str]]:
    """Delete models and versions from the trash, a model together with its versions.

    Returns:
        The ids of what was deleted, and an error message for each identifier that was not.
    """
    containers, errors = _find_in_project(db, project, identifiers)
    ids = [container.id for container in containers if container.trashed]
    errors += [
        f"{container.short_id} is not in the trash. Move it to the trash first."
        for container in containers
        if not container.trashed
    ]
    db.executemany("DELETE FROM container WHERE id = ? OR parent = ?", [(id_, id_) for id_ in ids])
    return ids, errors


def trashed_ids(db: sqlite3.Connection, project: Project) -> list[str]:
    """Return the ids of everything in a project's trash, versions before their models."""
    rows = db.execute(
        "SELECT c.id FROM container c JOIN attribute a ON a.container = c.id AND a.path = 'sys/trashed' "
        "WHERE c.project = ? AND a.value = 1 ORDER BY c.type = 'model', c.number",
        (project.id,),
    )
    return [row["id"] for row in rows]


def _find_in_project(
    db: sqlite3.Connection, project: Project, identifiers: Sequence[str]
) -> tuple[list[Container], list[str]]:
    containers, errors = [], []
    for identifier in identifiers:
        try:
            container = find_container(db, identifier)
        except ApiError as error:
            errors.append(error.detail)
            continue
        if container.project == project and container.type != "project":
            containers.append(container)
        else:
            errors.append(f"{identifier!r} is not a model or version of {project.qualified_name}.")
    return containers, errors


def _insert(db: sqlite3.Connection, container: Container, *, parent: str, values: Mapping[str, str]) -> None:
    db.execute(
        "INSERT INTO container(id, project, parent, type, short_id) VALUES (?, ?, ?, ?, ?)",
        (container.id, container.project.id, parent, container.type, container.short_id),
    )
    time = now()
    fields: dict[str, object] = {
        "sys/name": "Untitled",
        "sys/owner": "registry",
        "sys/creation_time": time,
        "sys/modification_time": time,
        "sys/ping_time": time,
        "sys/trashed": 0,
        "sys/state": "running",
        "sys/size": 0.0,
        "sys/tags": "[]",
        **values,
    }
    db.executemany(
        "INSERT INTO attribute VALUES (?, ?, ?, ?)",
        [(container.id, path, SYSTEM_FIELDS[path], value) for path, value in fields.items()],
    )
