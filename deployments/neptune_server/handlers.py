"""What the operations on sessions, projects, models, versions and their fields do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from deployments.neptune_server import containers, fields, search
from deployments.neptune_server.api import OPERATIONS
from deployments.neptune_server.calls import Call
from deployments.neptune_server.dispatch import handles
from deployments.neptune_server.errors import bad_request

# Parts of a file: small enough that a retry costs little, many enough for 1 TB.
_PART_BYTES = 8 << 20
_UPLOADS = {
    "enabled": True,
    "minChunkSize": _PART_BYTES,
    "maxChunkSize": 1 << 30,
    "maxChunkCount": 1000,
    "maxSinglePartSize": _PART_BYTES,
}
_MOST_POINTS = 10_000


@handles("getClientConfig")
def _client_config(call: Call) -> Any:
    return {
        "apiUrl": call.url,
        "applicationUrl": call.url,
        "pyLibVersions": {},
        "multiPartUpload": _UPLOADS,
        "artifacts": {"enabled": True, "apiVersion": 2},
        "sysNameSetByBackend": False,
    }


@handles("exchangeApiToken")
def _exchange(call: Call) -> Any:
    access, refresh = call.tokens.session(call.url)
    return {"accessToken": access, "refreshToken": refresh}


@handles("getProject")
def _get_project(call: Call) -> Any:
    name = call.text("projectIdentifier")
    if call.create_projects and "/" in name:
        call.registry.ensure_project(name)
    return containers.find_project(call.registry.database.reading, name).answer()


@handles("listProjects")
def _list_projects(call: Call) -> Any:
    found = containers.list_projects(call.registry.database.reading, call.optional("organizationIdentifier"))
    wanted = call.optional("searchTerm") or ""
    matching = [project.answer() for project in found if wanted in project.name]
    return {"entries": matching[: call.number("limit", default=len(matching))]}


@handles("createProject")
def _create_project(call: Call) -> Any:
    given = call.json_object()
    name = f"{given.get('organizationId')}/{given.get('name')}"
    with call.registry.database.writing() as db:
        return containers.make_project(db, name, key=given.get("projectKey")).answer()


@handles("listOrganizations")
def _list_workspaces(call: Call) -> Any:
    found = containers.list_projects(call.registry.database.reading, None)
    return [{"id": name, "name": name} for name in sorted({project.workspace for project in found})]


@handles("createExperiment")
def _create(call: Call) -> Any:
    given = call.json_object()
    with call.registry.database.writing() as db:
        project = containers.find_project(db, str(given.get("projectIdentifier")))
        if given.get("type") == "model":
            return containers.make_model(db, project, str(given.get("key") or "")).answer()
        if given.get("type") == "modelVersion":
            return containers.make_model_version(db, project, str(given.get("parentId"))).answer()
    raise bad_request(f"This server keeps models and their versions, no {given.get('type')!r}.")


@handles("getExperiment")
def _get(call: Call) -> Any:
    return _container(call).answer()


@handles("trashExperiments")
def _trash(call: Call) -> Any:
    return _change(call, containers.trash, call.json_list())


@handles("deleteExperiments")
def _delete(call: Call) -> Any:
    return _change(call, containers.delete, call.json_list())


@handles("deleteAllExperiments")
def _clear_trash(call: Call) -> Any:
    db = call.registry.database.reading
    project = containers.find_project(db, call.text("projectIdentifier"))
    return _change(call, containers.delete, containers.trashed_ids(db, project))


@handles("ping")
def _ping(call: Call) -> Any:
    with call.registry.database.writing() as db:
        container = containers.find_container(db, call.text("experimentId"))
        db.execute(
            "UPDATE attribute SET value = ? WHERE container = ? AND path = 'sys/ping_time'",
            (containers.now(), container.id),
        )
    return {}


@handles("executeOperations")
def _execute(call: Call) -> Any:
    operations = call.json_list()
    with call.registry.database.writing() as db:
        container = containers.find_container(db, call.text("experimentId"))
        return [{"errorDescription": error} for error in fields.execute(db, container, operations)]


@handles("getExperimentAttributes")
def _get_all(call: Call) -> Any:
    return {"attributes": fields.read_all(call.registry.database.reading, _container(call).id)}


@handles("getFloatSeriesValues", "getStringSeriesValues")
def _get_points(call: Call) -> Any:
    return fields.read_points(
        call.registry.database.reading,
        _container(call),
        call.text("attribute"),
        offset=call.number("offset", default=0),
        limit=min(call.number("limit", default=_MOST_POINTS), _MOST_POINTS),
    )


def _get_field(kind: str, call: Call) -> Any:
    return fields.read(call.registry.database.reading, _container(call), call.text("attribute"), kind)


for _name in OPERATIONS:
    if _name.startswith("get") and _name.endswith("Attribute"):
        _kind = _name.removeprefix("get").removesuffix("Attribute")
        handles(_name)(partial(_get_field, _kind[0].lower() + _kind[1:]))


@handles("searchLeaderboardEntries")
def _search(call: Call) -> Any:
    given = call.json_object()
    db = call.registry.database.reading
    project = containers.find_project(db, call.text("projectIdentifier"))
    return search.search(db, project, call.query.get("type", ()), given)


@handles("searchLeaderboardAttributes")
def _column_types(call: Call) -> Any:
    db = call.registry.database.reading
    project = containers.find_project(db, call.text("projectIdentifier"))
    types = call.query.get("type", ())
    return {"entries": search.column_types(db, project, types, call.optional("search") or "")}


def _container(call: Call) -> containers.Container:
    return containers.find_container(call.registry.database.reading, call.text("experimentId"))


def _change(call: Call, change: Callable[..., tuple[list[str], list[str]]], identifiers: Sequence[Any]) -> Any:
    with call.registry.database.writing() as db:
        project = containers.find_project(db, call.text("projectIdentifier"))
        changed, errors = change(db, project, [str(one) for one in identifiers])
    return {"updatedExperimentIdentifiers": changed, "errors": errors}
