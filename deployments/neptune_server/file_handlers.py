"""What the operations on files and artifacts do."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

from deployments.neptune_server import artifacts, containers
from deployments.neptune_server.api import OPERATIONS
from deployments.neptune_server.calls import Call, FileAnswer
from deployments.neptune_server.dispatch import handles
from deployments.neptune_server.errors import FieldError, bad_request


@handles("fileAtomUpload")
def _upload(call: Call) -> Any:
    where = call.text("experimentIdentifier"), call.text("attribute")
    with FieldErrors() as errors:
        call.registry.files.upload(*where, call.body, sub_path=None, ext=call.optional("ext") or "")
    return errors.answer()


@handles("fileSetFileUpload")
def _upload_of_set(call: Call) -> Any:
    where = call.text("experimentIdentifier"), call.text("attribute")
    with FieldErrors() as errors:
        call.registry.files.upload(*where, call.body, sub_path=call.text("subPath"), ext="")
    return errors.answer()


@handles("uploadFileSetAttributeTar")
def _upload_tar(call: Call) -> Any:
    where = call.text("experimentId"), call.text("attribute")
    with FieldErrors() as errors:
        call.registry.files.upload_tar(*where, call.body, reset=call.optional("reset") == "True")
    return errors.answer()


@handles("fileAtomMultipartUploadStart", "fileSetFileMultipartUploadStart")
def _start_parts(call: Call) -> Any:
    upload = None
    with FieldErrors() as errors:
        upload = call.registry.uploads.start(
            call.text("experimentIdentifier"),
            call.text("attribute"),
            size=call.number("totalLength"),
            sub_path=call.optional("subPath"),
            ext=call.optional("ext") or "",
        )
    return {"uploadId": upload, **errors.answer()}


@handles("fileAtomMultipartUploadPart", "fileSetFileMultipartUploadPart")
def _add_part(call: Call) -> Any:
    x_range = call.headers.get("X-Range") or ""
    call.registry.uploads.add_part(call.text("uploadId"), call.body, size=call.body.size, x_range=x_range)
    return {"errors": []}


@handles("fileAtomMultipartUploadFinish", "fileSetFileMultipartUploadFinish")
def _finish_parts(call: Call) -> Any:
    with FieldErrors() as errors:
        call.registry.uploads.finish(call.text("uploadId"))
    return errors.answer()


@handles("downloadAttribute")
def _download(call: Call) -> Any:
    sha256, name = call.registry.files.open(call.text("experimentId"), call.text("attribute"))
    return FileAnswer(call.registry.blobs.path(sha256).open("rb"), name)


@handles("prepareForDownloadFileSetAttributeZip")
def _prepare_zip(call: Call) -> Any:
    where = call.text("experimentId"), call.text("attribute")
    call.registry.files.check_set(*where)
    # The id says what to pack, so that nothing has to be kept until the client comes for it.
    return _zip_at(call, base64.urlsafe_b64encode(json.dumps(where).encode()).decode())


@handles("getDownloadPrepareRequest")
def _where_is_zip(call: Call) -> Any:
    return _zip_at(call, call.text("id"))


@handles("downloadFileSetZip")
def _download_zip(call: Call) -> Any:
    try:
        container_id, path = json.loads(base64.urlsafe_b64decode(call.text("id")))
    except ValueError as error:
        raise bad_request("The parameter 'id' is no download.") from error
    file = call.registry.blobs.nameless()
    try:
        call.registry.files.write_zip(container_id, path, file)
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return FileAnswer(file, f"{path.rpartition('/')[2]}.zip", "application/zip")


@handles("lsFileSetAttribute")
def _list_set(call: Call) -> Any:
    where = call.text("experimentId"), call.text("attribute")
    return call.registry.files.entries(*where, call.optional("path") or "")


@handles("createNewArtifact")
def _create_artifact(call: Call) -> Any:
    size = call.optional("size")
    with call.registry.database.writing() as db:
        project = containers.find_project(db, call.text("projectIdentifier"))
        return artifacts.create(db, project, call.text("hash"), None if size is None else int(size))


@handles("uploadArtifactFilesMetadata")
def _describe_artifact(call: Call) -> Any:
    return _with_artifact_files(call, artifacts.describe)


@handles("createArtifactVersion")
def _extend_artifact(call: Call) -> Any:
    return _with_artifact_files(call, artifacts.extend)


@handles("listArtifactFiles")
def _list_artifact(call: Call) -> Any:
    db = call.registry.database.reading
    project = containers.find_project(db, call.text("projectIdentifier"))
    return {"files": artifacts.list_files(db, project, call.text("hash"))}


class FieldErrors:
    """Keeps what a field could not take, for the answer."""

    def __init__(self) -> None:
        self._found: list[str] = []

    def __enter__(self) -> FieldErrors:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, FieldError):
            self._found.append(str(error))
            return True
        return False

    def answer(self) -> dict[str, Any]:
        """Return it as the API has it."""
        return {"errors": [{"errorDescription": text} for text in self._found]}


def _with_artifact_files(call: Call, change: Callable[..., Any]) -> Any:
    files = call.json_object().get("files") or []
    with call.registry.database.writing() as db:
        project = containers.find_project(db, call.text("projectIdentifier"))
        return change(db, project, call.text("hash"), files)


def _zip_at(call: Call, identifier: str) -> Any:
    path = OPERATIONS["downloadFileSetZip"].route[1]
    return {"id": identifier, "downloadUrl": f"{call.url}{path}?id={identifier}"}
