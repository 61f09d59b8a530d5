"""The shapes of what the API answers, as the definitions of a swagger document."""

from __future__ import annotations

Schema = dict[str, object]


def reference(name: str) -> Schema:
    """Return a reference to a definition."""
    return {"$ref": f"#/definitions/{name}"}


def array(items: str | Schema) -> Schema:
    """Return a list of a definition or of a schema."""
    return {"type": "array", "items": reference(items) if isinstance(items, str) else items}


def _object(**properties: str | Schema) -> Schema:
    """Return an object; a property given as a string is a reference."""
    return {
        "type": "object",
        "properties": {
            name: reference(value) if isinstance(value, str) else value for name, value in properties.items()
        },
    }


# The client's library drops properties that are absent or null unless they may be null.
_TEXT: Schema = {"type": "string", "x-nullable": True}
_NUMBER: Schema = {"type": "number", "x-nullable": True}
_WHOLE: Schema = {"type": "integer", "x-nullable": True}
_FLAG: Schema = {"type": "boolean", "x-nullable": True}
_TIME: Schema = {"type": "string", "format": "date-time", "x-nullable": True}

# What each type of field answers; the client asks for exactly these names.
FIELD_TYPES: dict[str, Schema] = {
    "float": _object(value=_NUMBER),
    "int": _object(value=_WHOLE),
    "bool": _object(value=_FLAG),
    "string": _object(value=_TEXT),
    "datetime": _object(value=_TIME),
    "experimentState": _object(value=_TEXT),
    "stringSet": _object(values=array(_TEXT)),
    "floatSeries": _object(last=_NUMBER),
    "stringSeries": _object(last=_TEXT),
    "file": _object(name=_TEXT, ext=_TEXT, size=_WHOLE),
    "fileSet": _object(size=_WHOLE),
    "artifact": _object(hash=_TEXT),
    "notebookRef": _object(value=_TEXT),
    "gitRef": _object(value=_TEXT),
    "imageSeries": _object(value=_TEXT),
}


def definition_of(field_type: str) -> str:
    """Return the name of a field type's definition: floatSeries gives FloatSeriesAttribute."""
    return f"{field_type[0].upper()}{field_type[1:]}Attribute"


DEFINITIONS: dict[str, Schema] = {
    "Anything": {"type": "object"},
    "SessionTokens": _object(accessToken=_TEXT, refreshToken=_TEXT),
    "Workspace": _object(id=_TEXT, name=_TEXT),
    "ClientConfig": _object(
        apiUrl=_TEXT,
        applicationUrl=_TEXT,
        pyLibVersions="ClientVersions",
        multiPartUpload="MultipartConfig",
        artifacts="ArtifactsConfig",
        sysNameSetByBackend=_FLAG,
    ),
    "ClientVersions": _object(minRecommendedVersion=_TEXT, minCompatibleVersion=_TEXT, maxCompatibleVersion=_TEXT),
    "MultipartConfig": _object(
        enabled=_FLAG,
        minChunkSize=_WHOLE,
        maxChunkSize=_WHOLE,
        maxChunkCount=_WHOLE,
        maxSinglePartSize=_WHOLE,
    ),
    "ArtifactsConfig": _object(enabled=_FLAG, apiVersion=_WHOLE),
    "Project": _object(id=_TEXT, name=_TEXT, organizationName=_TEXT, projectKey=_TEXT, version=_WHOLE),
    "Projects": _object(entries=array("Project")),
    "Container": _object(
        id=_TEXT, type=_TEXT, shortId=_TEXT, organizationName=_TEXT, projectName=_TEXT, trashed=_FLAG
    ),
    "Changed": _object(errors=array(_TEXT), updatedExperimentIdentifiers=array(_TEXT)),
    "FieldError": _object(errorDescription=_TEXT),
    "FieldErrors": _object(errors=array("FieldError")),
    "Upload": _object(uploadId=_TEXT, errors=array("FieldError")),
    "Attribute": _object(
        name=_TEXT, type=_TEXT, **{f"{kind}Properties": definition_of(kind) for kind in FIELD_TYPES}
    ),
    "Attributes": _object(attributes=array("Attribute")),
    "Columns": _object(entries=array("Attribute")),
    "FloatPoint": _object(timestampMillis=_WHOLE, step=_NUMBER, value=_NUMBER),
    "FloatPoints": _object(totalItemCount=_WHOLE, values=array("FloatPoint")),
    "StringPoint": _object(timestampMillis=_WHOLE, step=_NUMBER, value=_TEXT),
    "StringPoints": _object(totalItemCount=_WHOLE, values=array("StringPoint")),
    "Download": _object(id=_TEXT, downloadUrl=_TEXT),
    "FileEntry": _object(name=_TEXT, size=_WHOLE, mtime=_TIME, fileType=_TEXT),
    "Artifact": _object(artifactHash=_TEXT, hash=_TEXT, receivedMetadata=_FLAG, size=_WHOLE),
    "KeyValue": _object(key=_TEXT, value=_TEXT),
    "ArtifactFile": _object(filePath=_TEXT, fileHash=_TEXT, type=_TEXT, size=_WHOLE, metadata=array("KeyValue")),
    "ArtifactFiles": _object(files=array("ArtifactFile")),
    **{definition_of(kind): schema for kind, schema in FIELD_TYPES.items()},
}
