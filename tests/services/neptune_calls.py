"""Calls of the Neptune API without the client, for tests that want to see the server's own answers."""

from __future__ import annotations

import io
import tarfile
import urllib.error
from typing import Any
from urllib.parse import urlencode

from tests.services.neptune import Neptune

LEADERBOARD = "/api/leaderboard/v1"


def make_model(server: Neptune, project: str) -> str:
    identifier = server.call("GET", f"/api/backend/v1/projects/get?projectIdentifier={project}")["id"]
    made = {"projectIdentifier": identifier, "parentId": identifier, "type": "model", "key": "KEY"}
    return str(server.call("POST", f"{LEADERBOARD}/experiments", made)["id"])


def make_version(server: Neptune, project: str, model: str = "") -> str:
    parent = model or make_model(server, project)
    made = {"projectIdentifier": project, "parentId": parent, "type": "modelVersion"}
    return str(server.call("POST", f"{LEADERBOARD}/experiments", made)["id"])


def write(server: Neptune, version: str, *operations: dict[str, Any]) -> list[dict[str, str]]:
    path = f"{LEADERBOARD}/attributes/operations?experimentId={version}"
    answer: list[dict[str, str]] = server.call("POST", path, list(operations))
    return answer


def field(server: Neptune, version: str, kind: str, path: str) -> Any:
    return server.call("GET", f"{LEADERBOARD}/attributes/{kind}?experimentId={version}&attribute={path}")


def where(version: str, path: str, **others: object) -> str:
    return urlencode({"experimentIdentifier": version, "attribute": path, **others})


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
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w|gz") as archive:
        for name, body in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(body)
            archive.addfile(entry, io.BytesIO(body))
    return packed.getvalue()
