"""Operations of the API, the shapes of their responses, and the swagger document that describes both.

The client downloads such documents and builds its methods from them, so it makes no other calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from deployments.neptune_server.calls import Call

Handler = Callable[[Call], Any]
Schema = dict[str, object]

API_TOKEN_HEADER = "X-Neptune-Api-Token"  # noqa: S105 - the name of the header, not a token

# Where the client puts a parameter, by its name. All other parameters are text in the URL, numbers included.
_HEADERS = frozenset({API_TOKEN_HEADER, "X-Neptune-CliVersion"})
_LISTS = frozenset({"type", "sortBy", "sortDirection"})
_BODIES = frozenset(
    {
        "artifactFilesDTO",
        "experimentCreationParams",
        "experimentIdentifiers",
        "operations",
        "params",
        "projectToCreate",
    }
)


@dataclass(frozen=True)
class Operation:
    """One call of the API.

    Attributes:
        name: Name of the client's method.
        method: HTTP method.
        path: Path in the URL.
        parameters: Names of the method's arguments.
        response: Name of the definition of the JSON response; empty if the client needs no definition.
        handler: Function that answers the call.
    """

    name: str
    method: str
    path: str
    parameters: Sequence[str]
    response: str
    handler: Handler

    def swagger(self) -> Schema:
        """Return the operation as a swagger document describes it."""
        response = {"schema": _reference(self.response)} if self.response else {}
        return {
            "operationId": self.name,
            "tags": ["api"],
            "parameters": [_parameter(name) for name in self.parameters],
            "responses": {"200": {"description": "ok", **response}},
        }


def _parameter(name: str) -> Schema:
    if name in _BODIES:
        return {"name": name, "in": "body", "schema": {}}
    if name in _HEADERS:
        return {"name": name, "in": "header", "type": "string"}
    text: Schema = {"type": "string"}
    if name in _LISTS:
        return {"name": name, "in": "query", "type": "array", "items": text, "collectionFormat": "multi"}
    return {"name": name, "in": "query", **text}


def swagger(operations: Iterable[Operation]) -> Schema:
    """Return the swagger 2.0 document of the operations."""
    paths: dict[str, dict[str, Schema]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = operation.swagger()
    return {
        "swagger": "2.0",
        "info": {"title": "compileflow registry server", "version": "1"},
        "consumes": ["application/json"],
        "produces": ["application/json"],
        "paths": paths,
        "definitions": DEFINITIONS,
    }


def _reference(name: str) -> Schema:
    return {"$ref": f"#/definitions/{name}"}


def _list_of(items: str | Schema) -> Schema:
    return {"type": "array", "items": _reference(items) if isinstance(items, str) else items}


def _object(**properties: str | Schema) -> Schema:
    """Return the schema of an object; a property that is a string is the name of a definition."""
    return {
        "type": "object",
        "properties": {
            name: _reference(value) if isinstance(value, str) else value for name, value in properties.items()
        },
    }


# Without x-nullable, the client's swagger library drops a property whose value is null.
_TEXT: Schema = {"type": "string", "x-nullable": True}
_NUMBER: Schema = {"type": "number", "x-nullable": True}
_INTEGER: Schema = {"type": "integer", "x-nullable": True}
_FLAG: Schema = {"type": "boolean", "x-nullable": True}
_TIME: Schema = {"type": "string", "format": "date-time", "x-nullable": True}

# What the API returns for a field of each type whose value the client reads.
FIELD_TYPES: dict[str, Schema] = {
    "float": _object(value=_NUMBER),
    "int": _object(value=_INTEGER),
    "bool": _object(value=_FLAG),
    "string": _object(value=_TEXT),
    "datetime": _object(value=_TIME),
    "experimentState": _object(value=_TEXT),
    "stringSet": _object(values=_list_of(_TEXT)),
    "floatSeries": _object(last=_NUMBER),
    "stringSeries": _object(last=_TEXT),
    "file": _object(name=_TEXT, ext=_TEXT, size=_INTEGER),
    "artifact": _object(hash=_TEXT),
}

DEFINITIONS: dict[str, Schema] = {
    "ClientConfig": _object(
        apiUrl=_TEXT, applicationUrl=_TEXT, multiPartUpload="MultipartConfig", artifacts="ArtifactsConfig"
    ),
    "MultipartConfig": _object(
        enabled=_FLAG,
        minChunkSize=_INTEGER,
        maxChunkSize=_INTEGER,
        maxChunkCount=_INTEGER,
        maxSinglePartSize=_INTEGER,
    ),
    "ArtifactsConfig": _object(enabled=_FLAG, apiVersion=_INTEGER),
    "SessionTokens": _object(accessToken=_TEXT, refreshToken=_TEXT),
    "Workspace": _object(id=_TEXT, name=_TEXT),
    "Workspaces": _list_of("Workspace"),
    "Project": _object(id=_TEXT, name=_TEXT, organizationName=_TEXT, projectKey=_TEXT, version=_INTEGER),
    "Projects": _object(entries=_list_of("Project")),
    "Container": _object(
        id=_TEXT, type=_TEXT, shortId=_TEXT, organizationName=_TEXT, projectName=_TEXT, trashed=_FLAG
    ),
    "Changes": _object(updatedExperimentIdentifiers=_list_of(_TEXT), errors=_list_of(_TEXT)),
    "Column": _object(name=_TEXT, type=_TEXT),
    "Columns": _object(entries=_list_of("Column")),
    **{f"{field_type}Properties": schema for field_type, schema in FIELD_TYPES.items()},
    "Attribute": _object(
        name=_TEXT,
        type=_TEXT,
        **{f"{field_type}Properties": f"{field_type}Properties" for field_type in FIELD_TYPES},
    ),
    "Attributes": _object(attributes=_list_of("Attribute")),
    "FloatPoint": _object(timestampMillis=_INTEGER, step=_NUMBER, value=_NUMBER),
    "FloatPoints": _object(totalItemCount=_INTEGER, values=_list_of("FloatPoint")),
    "StringPoint": _object(timestampMillis=_INTEGER, step=_NUMBER, value=_TEXT),
    "StringPoints": _object(totalItemCount=_INTEGER, values=_list_of("StringPoint")),
    "FieldError": _object(errorDescription=_TEXT),
    "FieldErrors": _list_of("FieldError"),
    "Upload": _object(uploadId=_TEXT, errors=_list_of("FieldError")),
    "UploadResult": _object(errors=_list_of("FieldError")),
    "ZipRequest": _object(id=_TEXT),
    "ZipDownload": _object(downloadUrl=_TEXT),
    "FileEntry": _object(name=_TEXT, size=_INTEGER, mtime=_TIME, fileType=_TEXT),
    "FileEntries": _list_of("FileEntry"),
    "Artifact": _object(artifactHash=_TEXT, hash=_TEXT, receivedMetadata=_FLAG, size=_INTEGER),
    "ArtifactFile": _object(
        filePath=_TEXT, fileHash=_TEXT, type=_TEXT, size=_INTEGER, metadata=_list_of("MetadataEntry")
    ),
    "ArtifactFiles": _object(files=_list_of("ArtifactFile")),
    "MetadataEntry": _object(key=_TEXT, value=_TEXT),
}
