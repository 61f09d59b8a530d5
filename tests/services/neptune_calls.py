"""Calls of the Neptune API without the client, for tests of the server's responses."""

from __future__ import annotations

import io
import tarfile
import urllib.error
from typing import Any
from urllib.parse import urlencode

from deployments.neptune_server.api import BACKEND, LEADERBOARD
from tests.services.neptune import Neptune


def make_model(server: Neptune, project: str) -> str:
    identifier = server.call("GET", f"{BACKEND}/projects/get?projectIdentifier={project}")["id"]
    body = {"projectIdentifier": identifier, "parentId": identifier, "type": "model", "key": "KEY"}
    return str(server.call("POST", f"{LEADERBOARD}/experiments", body)["id"])


def make_version(server: Neptune, project: str, model: str = "") -> str:
    parent = model or make_model(server, project)
    body = {"projectIdentifier": project, "parentId": parent, "type": "modelVersion"}
    return str(server.call("POST", f"{LEADERBOARD}/experiments", body)["id"])


def write(server: Neptune, version: str, *operations: dict[str, Any]) -> list[dict[str, str]]:
    path = f"{LEADERBOARD}/attributes/operations?experimentId={version}"
    errors: list[dict[str, str]] = server.call("POST", path, list(operations))
    return errors


def field(server: Neptune, version: str, kind: str, path: str) -> Any:
    return server.call("GET", f"{LEADERBOARD}/attributes/{kind}?experimentId={version}&attribute={path}")


def upload_query(version: str, path: str, **parameters: object) -> str:
    return urlencode({"experimentIdentifier": version, "attribute": path, **parameters})


def download(server: Neptune, version: str, path: str) -> bytes:
    query = urlencode({"experimentId": version, "attribute": path})
    return server.send("GET", f"{LEADERBOARD}/attributes/file/download?{query}", None, server.session())


def status_of(server: Neptune, method: str, path: str, headers: dict[str, str], body: bytes | None = None) -> int:
    try:
        server.send(method, path, body or (b"" if method == "POST" else None), headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    return 200


def tar_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w|gz") as archive:
        for name, body in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(body)
            archive.addfile(entry, io.BytesIO(body))
    return buffer.getvalue()
