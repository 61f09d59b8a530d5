"""The API: every call that the client makes, and the function that answers it."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from deployments.neptune_server import artifacts, containers, fields, search
from deployments.neptune_server.calls import Call, FileResponse
from deployments.neptune_server.errors import FieldError, bad_request
from deployments.neptune_server.swagger import API_TOKEN_HEADER, FIELD_TYPES, Handler, Operation

BACKEND = "/api/backend/v1"
LEADERBOARD = "/api/leaderboard/v1"
ARTIFACTS = "/api/artifacts/v1"
_ZIP_PATH = f"{LEADERBOARD}/attributes/fileset/zip/download"

# Query parameters that several operations have.
_FIELD = ("experimentId", "attribute")
_FILE = ("experimentIdentifier", "attribute")
_FILE_OF_SET = (*_FILE, "subPath")
_POINTS = (*_FIELD, "offset", "limit")
_ARTIFACT = ("projectIdentifier", "hash")

# Parts are small enough that a retry costs little, and there are enough of them for a file of 1 TB.
_PART_BYTES = 8 << 20
_MULTIPART_CONFIG = {
    "enabled": True,
    "minChunkSize": _PART_BYTES,
    "maxChunkSize": 1 << 30,
    "maxChunkCount": 1000,
    "maxSinglePartSize": _PART_BYTES,
}

OPERATIONS: dict[tuple[str, str], Operation] = {}
"""Operations by HTTP method and path."""


def operation(
    name: str, method: str, path: str, parameters: Sequence[str] = (), response: str = ""
) -> Callable[[Handler], Handler]:
    """Add an operation whose handler is the decorated function; the arguments are the fields of `Operation`."""

    def add(handler: Handler) -> Handler:
        OPERATIONS[method, path] = Operation(name, method, path, parameters, response, handler)
        return handler

    return add


# Sessions and projects


@operation("getClientConfig", "GET", f"{BACKEND}/clients/config", ["alpha", API_TOKEN_HEADER], "ClientConfig")
def _get_client_config(call: Call) -> Any:
    return {
        "apiUrl": call.url,
        "applicationUrl": call.url,
        "multiPartUpload": _MULTIPART_CONFIG,
        "artifacts": {"enabled": True, "apiVersion": 2},
    }


@operation("exchangeApiToken", "GET", f"{BACKEND}/authorization/oauth-token", [API_TOKEN_HEADER], "SessionTokens")
def _exchange_api_token(call: Call) -> Any:
    access, refresh = call.tokens.session(call.url)
    return {"accessToken": access, "refreshToken": refresh}


@operation("getProject", "GET", f"{BACKEND}/projects/get", ["projectIdentifier"], "Project")
def _get_project(call: Call) -> Any:
    return _project(call).to_json()


@operation(
    "listProjects",
    "GET",
    f"{BACKEND}/projects/list",
    ["limit", "organizationIdentifier", "searchTerm", "userRelation", "sortBy", "sortDirection"],
    "Projects",
)
def _list_projects(call: Call) -> Any:
    projects = containers.list_projects(call.db, call.optional("organizationIdentifier"))
    search_term = call.optional("searchTerm") or ""
    entries = [project.to_json() for project in projects if search_term in project.name]
    return {"entries": entries[: call.number("limit")] if call.optional("limit") else entries}


@operation("createProject", "POST", f"{BACKEND}/projects", ["projectToCreate"], "Project")
def _create_project(call: Call) -> Any:
    body = call.json_object()
    name = f"{body.get('organizationId')}/{body.get('name')}"
    with call.registry.database.writing() as db:
        return containers.create_project(db, name, key=body.get("projectKey")).to_json()


@operation("listOrganizations", "GET", f"{BACKEND}/organizations", [], "Workspaces")
def _list_workspaces(call: Call) -> Any:
    projects = containers.list_projects(call.db, None)
    return [{"id": name, "name": name} for name in sorted({project.workspace for project in projects})]


# Models and model versions


@operation(
    "createExperiment",
    "POST",
    f"{LEADERBOARD}/experiments",
    ["X-Neptune-CliVersion", "experimentCreationParams"],
    "Container",
)
def _create_container(call: Call) -> Any:
    body = call.json_object()
    with call.registry.database.writing() as db:
        project = containers.find_project(db, str(body.get("projectIdentifier")))
        if body.get("type") == "model":
            return containers.create_model(db, project, str(body.get("key") or "")).to_json()
        if body.get("type") == "modelVersion":
            return containers.create_model_version(db, project, str(body.get("parentId"))).to_json()
    raise bad_request(
        f"Expected type 'model' or 'modelVersion', got {body.get('type')!r}. This server does not support runs."
    )


@operation("getExperiment", "GET", f"{LEADERBOARD}/experiments", ["experimentId"], "Container")
def _get_container(call: Call) -> Any:
    return _container(call).to_json()


@operation(
    "trashExperiments",
    "POST",
    f"{LEADERBOARD}/experiments/trash",
    ["projectIdentifier", "experimentIdentifiers"],
    "Changes",
)
def _trash_containers(call: Call) -> Any:
    return _change_containers(call, containers.trash, call.json_list())


@operation(
    "deleteExperiments",
    "POST",
    f"{LEADERBOARD}/experiments/delete",
    ["projectIdentifier", "experimentIdentifiers"],
    "Changes",
)
def _delete_containers(call: Call) -> Any:
    return _change_containers(call, containers.delete, call.json_list())


@operation("deleteAllExperiments", "POST", f"{LEADERBOARD}/experiments/clear", ["projectIdentifier"], "Changes")
def _clear_trash(call: Call) -> Any:
    return _change_containers(call, containers.delete, containers.trashed_ids(call.db, _project(call)))


@operation("ping", "POST", f"{LEADERBOARD}/experiments/ping", ["experimentId"])
def _ping(call: Call) -> Any:
    with call.registry.database.writing() as db:
        fields.put(db, _container(call), "sys/ping_time", "datetime", containers.now())
    return {}


@operation(
    "searchLeaderboardEntries",
    "POST",
    f"{LEADERBOARD}/leaderboard/entries/search",
    ["projectIdentifier", "type", "params"],
)
def _search_table(call: Call) -> Any:
    return search.search(call.db, _project(call), call.texts("type"), call.json_object())


@operation(
    "searchLeaderboardAttributes",
    "POST",
    f"{LEADERBOARD}/leaderboard/attributes/search",
    ["projectIdentifier", "search", "type", "params"],
    "Columns",
)
def _get_column_types(call: Call) -> Any:
    column = call.text("search")
    types = search.column_types(call.db, _project(call), call.texts("type"), column)
    return {"entries": [{"name": column, "type": field_type} for field_type in types]}


# Fields


@operation(
    "executeOperations",
    "POST",
    f"{LEADERBOARD}/attributes/operations",
    ["experimentId", "operations"],
    "FieldErrors",
)
def _write_fields(call: Call) -> Any:
    operations = call.json_list()
    with call.registry.database.writing() as db:
        return [{"errorDescription": error} for error in fields.execute(db, _container(call), operations)]


@operation("getExperimentAttributes", "GET", f"{LEADERBOARD}/attributes/all", ["experimentId"], "Attributes")
def _get_fields(call: Call) -> Any:
    return {"attributes": fields.read_all(call.db, _container(call).id)}


def _get_field(field_type: str, call: Call) -> Any:
    return fields.read(call.db, _container(call), call.text("attribute"), field_type)


# getFloatAttribute, getStringSetAttribute, and so on. The client has no such call for the state.
for _field_type in FIELD_TYPES.keys() - {"experimentState"}:
    operation(
        f"get{_field_type[0].upper()}{_field_type[1:]}Attribute",
        "GET",
        f"{LEADERBOARD}/attributes/{_field_type}",
        _FIELD,
        f"{_field_type}Properties",
    )(partial(_get_field, _field_type))


@operation("getFloatSeriesValues", "GET", f"{LEADERBOARD}/attributes/floatSeries/values", _POINTS, "FloatPoints")
@operation(
    "getStringSeriesValues", "GET", f"{LEADERBOARD}/attributes/stringSeries/values", _POINTS, "StringPoints"
)
def _get_points(call: Call) -> Any:
    return fields.read_points(
        call.db,
        _container(call),
        call.text("attribute"),
        offset=call.number("offset"),
        limit=call.number("limit"),
    )


# Files and file sets


@operation("fileAtomUpload", "POST", f"{LEADERBOARD}/attributes/file/upload", [*_FILE, "ext"], "UploadResult")
@operation("fileSetFileUpload", "POST", f"{LEADERBOARD}/attributes/fileset/upload", _FILE_OF_SET, "UploadResult")
def _upload(call: Call) -> Any:
    with _field_errors() as errors:
        call.registry.files.upload(
            call.text("experimentIdentifier"),
            call.text("attribute"),
            call.body,
            sub_path=call.optional("subPath"),
            ext=call.optional("ext") or "",
        )
    return {"errors": errors}


@operation(
    "fileAtomMultipartUploadStart",
    "POST",
    f"{LEADERBOARD}/attributes/file/multipart/start",
    [*_FILE, "ext", "totalLength"],
    "Upload",
)
@operation(
    "fileSetFileMultipartUploadStart",
    "POST",
    f"{LEADERBOARD}/attributes/fileset/multipart/start",
    [*_FILE_OF_SET, "totalLength"],
    "Upload",
)
def _start_upload(call: Call) -> Any:
    upload = None
    with _field_errors() as errors:
        upload = call.registry.files.start_upload(
            call.text("experimentIdentifier"),
            call.text("attribute"),
            size=call.number("totalLength"),
            sub_path=call.optional("subPath"),
            ext=call.optional("ext") or "",
        )
    return {"uploadId": upload, "errors": errors}


@operation(
    "fileAtomMultipartUploadPart",
    "POST",
    f"{LEADERBOARD}/attributes/file/multipart/part",
    [*_FILE, "uploadId", "uploadPartIdx"],
    "UploadResult",
)
@operation(
    "fileSetFileMultipartUploadPart",
    "POST",
    f"{LEADERBOARD}/attributes/fileset/multipart/part",
    [*_FILE_OF_SET, "uploadId", "uploadPartIdx"],
    "UploadResult",
)
def _upload_part(call: Call) -> Any:
    x_range = call.headers.get("X-Range") or ""
    call.registry.files.add_part(call.text("uploadId"), call.body, size=call.body.size, x_range=x_range)
    return {"errors": []}


@operation(
    "fileAtomMultipartUploadFinish",
    "POST",
    f"{LEADERBOARD}/attributes/file/multipart/finish",
    [*_FILE, "uploadId"],
    "UploadResult",
)
@operation(
    "fileSetFileMultipartUploadFinish",
    "POST",
    f"{LEADERBOARD}/attributes/fileset/multipart/finish",
    [*_FILE_OF_SET, "uploadId"],
    "UploadResult",
)
def _finish_upload(call: Call) -> Any:
    with _field_errors() as errors:
        call.registry.files.finish_upload(call.text("uploadId"))
    return {"errors": errors}


@operation(
    "uploadFileSetAttributeTar",
    "POST",
    f"{LEADERBOARD}/attributes/fileset/tar",
    [*_FIELD, "reset"],
    "UploadResult",
)
def _upload_tar(call: Call) -> Any:
    # The client deletes the field itself before it sends reset=True.
    with _field_errors() as errors:
        call.registry.files.upload_tar(call.text("experimentId"), call.text("attribute"), call.body)
    return {"errors": errors}


@operation("downloadAttribute", "GET", f"{LEADERBOARD}/attributes/file/download", _FIELD)
def _download_file(call: Call) -> Any:
    sha256, name = call.registry.files.find(call.text("experimentId"), call.text("attribute"))
    return FileResponse(call.registry.blobs.path(sha256).open("rb"), name)


@operation(
    "prepareForDownloadFileSetAttributeZip", "POST", f"{LEADERBOARD}/attributes/fileset/zip", _FIELD, "ZipRequest"
)
def _request_zip(call: Call) -> Any:
    field = call.text("experimentId"), call.text("attribute")
    call.registry.files.check_file_set(*field)
    # The id names the field, so the server has nothing to remember until the download.
    return {"id": base64.urlsafe_b64encode(json.dumps(field).encode()).decode()}


@operation("getDownloadPrepareRequest", "GET", f"{LEADERBOARD}/attributes/fileset/zip", ["id"], "ZipDownload")
def _get_zip_url(call: Call) -> Any:
    return {"downloadUrl": f"{call.url}{_ZIP_PATH}?id={call.text('id')}"}


@operation("downloadFileSetZip", "GET", _ZIP_PATH, ["id"])
def _download_zip(call: Call) -> Any:
    try:
        container_id, path = json.loads(base64.urlsafe_b64decode(call.text("id")))
    except ValueError as error:
        raise bad_request(f"Expected the id of a zip, got {call.text('id')!r}.") from error
    file = call.registry.blobs.open_unnamed()
    try:
        call.registry.files.write_zip(container_id, path, file)
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return FileResponse(file, f"{path.rpartition('/')[2]}.zip")


@operation("lsFileSetAttribute", "GET", f"{LEADERBOARD}/attributes/fileset/ls", [*_FIELD, "path"], "FileEntries")
def _list_file_set(call: Call) -> Any:
    return call.registry.files.entries(
        call.text("experimentId"), call.text("attribute"), call.optional("path") or ""
    )


# Artifacts


@operation(
    "createNewArtifact", "POST", f"{ARTIFACTS}/artifacts", [*_ARTIFACT, "size", "parentIdentifier"], "Artifact"
)
def _create_artifact(call: Call) -> Any:
    # The client sends no size if it does not know the size of one of the files.
    size = call.number("size") if call.optional("size") else None
    with call.registry.database.writing() as db:
        return artifacts.create(db, _project(call), call.text("hash"), size)


@operation(
    "uploadArtifactFilesMetadata",
    "POST",
    f"{ARTIFACTS}/artifacts/files",
    [*_ARTIFACT, "artifactFilesDTO"],
    "Artifact",
)
def _describe_artifact(call: Call) -> Any:
    return _change_artifact(call, artifacts.describe)


@operation(
    "createArtifactVersion",
    "POST",
    f"{ARTIFACTS}/artifacts/version",
    [*_ARTIFACT, "parentIdentifier", "artifactFilesDTO"],
    "Artifact",
)
def _extend_artifact(call: Call) -> Any:
    return _change_artifact(call, artifacts.extend)


@operation("listArtifactFiles", "GET", f"{ARTIFACTS}/artifacts/files", _ARTIFACT, "ArtifactFiles")
def _list_artifact_files(call: Call) -> Any:
    return {"files": artifacts.list_files(call.db, _project(call), call.text("hash"))}


def _project(call: Call) -> containers.Project:
    return containers.find_project(call.db, call.text("projectIdentifier"))


def _container(call: Call) -> containers.Container:
    return containers.find_container(call.db, call.text("experimentId"))


def _change_containers(
    call: Call, change: Callable[..., tuple[list[str], list[str]]], identifiers: Sequence[Any]
) -> Any:
    with call.registry.database.writing() as db:
        changed_ids, errors = change(db, _project(call), [str(identifier) for identifier in identifiers])
    return {"updatedExperimentIdentifiers": changed_ids, "errors": errors}


def _change_artifact(call: Call, change: Callable[..., Any]) -> Any:
    files = call.json_object().get("files") or []
    with call.registry.database.writing() as db:
        return change(db, _project(call), call.text("hash"), files)


@contextmanager
def _field_errors() -> Iterator[list[dict[str, str]]]:
    """Collect a FieldError of the block for the response."""
    errors: list[dict[str, str]] = []
    try:
        yield errors
    except FieldError as error:
        errors.append({"errorDescription": str(error)})
