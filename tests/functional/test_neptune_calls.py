"""The Neptune-compatible server without the client: forged tokens, malformed requests, many writers, a kill."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sqlite3
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from deployments.neptune_server.api import BACKEND, LEADERBOARD, OPERATIONS
from deployments.neptune_server.swagger import DEFINITIONS
from deployments.neptune_server.tokens import make_api_token
from tests.services.neptune import Neptune, serve_neptune, wait_until
from tests.services.neptune_calls import (
    download,
    field,
    make_model,
    make_version,
    status_of,
    tar_of,
    upload_query,
    write,
)
from tests.services.secrets import NEPTUNE_API_KEY


def test_every_operation_needs_a_valid_token(neptune_server: Neptune) -> None:
    authorization = neptune_server.session()["Authorization"]
    forged = f"{authorization[:-4]}AAAA"
    other = make_api_token(neptune_server.url, "no-such-key")
    for method, path in OPERATIONS:
        for headers in (
            {},
            {"Authorization": forged},
            {"Authorization": "Bearer x"},
            {"X-Neptune-Api-Token": other},
        ):
            assert status_of(neptune_server, method, path, headers) == 401, path


def test_responses_use_the_address_in_the_clients_token(neptune_server: Neptune, neptune_project: str) -> None:
    url = "https://registry.example:8443"
    token = {"X-Neptune-Api-Token": neptune_server.token_for(url)}
    config = json.loads(neptune_server.send("GET", f"{BACKEND}/clients/config", None, token))
    assert config["apiUrl"] == url
    tokens = json.loads(neptune_server.send("GET", f"{BACKEND}/authorization/oauth-token", None, token))
    session = {"Authorization": f"Bearer {tokens['accessToken']}"}
    version = make_version(neptune_server, neptune_project)
    upload = f"{LEADERBOARD}/attributes/fileset/upload?{upload_query(version, 'set', subPath='a/b')}"
    neptune_server.send("POST", upload, b"x", session)
    zip_path = f"{LEADERBOARD}/attributes/fileset/zip"
    query = f"experimentId={version}&attribute=set"
    zip_id = json.loads(neptune_server.send("POST", f"{zip_path}?{query}", b"", session))["id"]
    response = json.loads(neptune_server.send("GET", f"{zip_path}?id={zip_id}", None, session))
    assert response["downloadUrl"].startswith(f"{url}{LEADERBOARD}/")


def test_refresh_needs_a_refresh_token(neptune_server: Neptune) -> None:
    access = neptune_server.session()["Authorization"].removeprefix("Bearer ")
    path = "/auth/realms/neptune/protocol/openid-connect/token"
    for token in ("x", access):
        body = urlencode({"grant_type": "refresh_token", "refresh_token": token}).encode()
        assert status_of(neptune_server, "POST", path, {}, body) == 401


def test_log_contains_neither_keys_nor_values(neptune_server: Neptune, neptune_project: str) -> None:
    version = make_version(neptune_server, neptune_project)
    write(neptune_server, version, {"path": "field", "assignString": {"value": "written-value"}})
    # The server writes the line after the response.
    wait_until(lambda: f"POST {LEADERBOARD}/attributes/operations 200" in neptune_server.log.read_text("utf-8"))
    log = neptune_server.log.read_text("utf-8")
    for secret in (NEPTUNE_API_KEY, neptune_server.token, "Bearer", "eyJ", version, "written-value"):
        assert secret not in log


def test_every_response_has_a_definition() -> None:
    responses = {operation.response for operation in OPERATIONS.values() if operation.response}
    nested = {part.partition('"')[0] for part in json.dumps(DEFINITIONS).split("#/definitions/")[1:]}
    assert responses | nested == set(DEFINITIONS)


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        ({"path": "sys/stage", "assignString": {"value": "live"}}, "none, staging, production, archived"),
        ({"path": "sys/id", "assignString": {"value": "X"}}, "read-only"),
        ({"path": "s", "assignString": {"value": "x" * 16_385}}, "at most 16384 characters, got 16385"),
        ({"path": "sys/name", "assignFloat": {"value": 1.0}}, "expected type string, got float"),
        ({"path": "i", "logImages": {"entries": []}}, "does not support logImages"),
    ],
)
def test_invalid_value_of_a_field_is_reported_and_other_fields_are_written(
    neptune_server: Neptune, neptune_project: str, operation: dict[str, Any], message: str
) -> None:
    version = make_version(neptune_server, neptune_project)
    (error,) = write(neptune_server, version, operation, {"path": "other", "assignInt": {"value": 1}})
    assert message in error["errorDescription"]
    assert field(neptune_server, version, "int", "other") == {"value": 1}


@pytest.mark.parametrize(
    "operation",
    [
        {"path": "i", "assignInt": {"value": 2**70}},
        {"path": "i", "assignInt": {"value": "text"}},
        {"path": "i", "assignInt": {}},
        {"path": "i"},
        {"path": "s", "insertStrings": {"values": 5}},
    ],
)
def test_malformed_operation_is_refused_with_its_whole_request(
    neptune_server: Neptune, neptune_project: str, operation: dict[str, Any]
) -> None:
    version = make_version(neptune_server, neptune_project)
    with pytest.raises(urllib.error.HTTPError, match="400") as caught:
        write(neptune_server, version, {"path": "first", "assignInt": {"value": 1}}, operation)
    caught.value.close()
    with pytest.raises(urllib.error.HTTPError, match="404") as caught:
        field(neptune_server, version, "int", "first")
    caught.value.close()


def test_part_whose_size_differs_from_its_range_is_refused(neptune_server: Neptune, neptune_project: str) -> None:
    version = make_version(neptune_server, neptune_project)
    start = f"{LEADERBOARD}/attributes/file/multipart/start?{upload_query(version, 'f', totalLength=10)}"
    upload = neptune_server.call("POST", start)["uploadId"]
    part = f"{LEADERBOARD}/attributes/file/multipart/part?{upload_query(version, 'f', uploadId=upload)}"
    for x_range in ("bytes=0-4/10", "bytes=5-11/10", "bytes=0-5/12", "nothing"):
        with pytest.raises(urllib.error.HTTPError, match="400") as caught:
            neptune_server.call("POST", part, data=b"sixsix", X_Range=x_range)
        assert "Length of stream does not match given range" in caught.value.read().decode()
        caught.value.close()
    finish = f"{LEADERBOARD}/attributes/file/multipart/finish?{upload_query(version, 'f', uploadId=upload)}"
    neptune_server.call("POST", part, data=b"67890", X_Range="bytes=5-9/10")
    assert (
        "expected 10 bytes without a gap, got 0"
        in neptune_server.call("POST", finish)["errors"][0]["errorDescription"]
    )
    neptune_server.call("POST", part, data=b"12345", X_Range="bytes=0-4/10")
    # The client repeats the call if the response is lost; the second response is the same.
    assert neptune_server.call("POST", finish) == neptune_server.call("POST", finish) == {"errors": []}
    assert download(neptune_server, version, "f") == b"1234567890"


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b"])
def test_path_that_leads_out_of_a_file_set_is_refused(
    neptune_server: Neptune, neptune_project: str, name: str
) -> None:
    version = make_version(neptune_server, neptune_project)
    upload = f"{LEADERBOARD}/attributes/fileset/upload?{upload_query(version, 'set', subPath=name)}"
    tar = f"{LEADERBOARD}/attributes/fileset/tar?{urlencode({'experimentId': version, 'attribute': 'set'})}"
    for response in (
        neptune_server.call("POST", upload, data=b"x"),
        neptune_server.call("POST", tar, data=tar_of({"valid": b"y", name: b"x"})),
    ):
        assert name in response["errors"][0]["errorDescription"]
    # The valid file of the tar is not stored either.
    with pytest.raises(urllib.error.HTTPError, match="404") as caught:
        neptune_server.call("POST", f"{LEADERBOARD}/attributes/fileset/zip?experimentId={version}&attribute=set")
    caught.value.close()


def test_twenty_concurrent_writers_lose_nothing(neptune_server: Neptune, neptune_project: str) -> None:
    model = make_model(neptune_server, neptune_project)
    session = neptune_server.session()

    def work(number: int) -> tuple[str, str]:
        body = {"projectIdentifier": neptune_project, "parentId": model, "type": "modelVersion"}
        path = f"{LEADERBOARD}/experiments"
        version = json.loads(neptune_server.send("POST", path, json.dumps(body).encode(), session))
        for step in range(3):
            operations = [{"path": f"field/{step}", "assignInt": {"value": number}}]
            path = f"{LEADERBOARD}/attributes/operations?experimentId={version['id']}"
            assert neptune_server.send("POST", path, json.dumps(operations).encode(), session) == b"[]"
            query = upload_query(version["id"], "set", subPath=f"{step}.bin")
            path = f"{LEADERBOARD}/attributes/fileset/upload?{query}"
            neptune_server.send("POST", path, b"%d" % number * 1000, session)
        return version["id"], version["shortId"]

    with ThreadPoolExecutor(20) as pool:
        versions = list(pool.map(work, range(20)))
    assert {short_id.rpartition("-")[2] for _, short_id in versions} == {str(number) for number in range(1, 21)}
    for number, (version, _) in enumerate(versions):
        response = neptune_server.call("GET", f"{LEADERBOARD}/attributes/all?experimentId={version}")
        fields = {field["name"]: field[f"{field['type']}Properties"] for field in response["attributes"]}
        assert [fields[f"field/{step}"]["value"] for step in range(3)] == [number] * 3
        assert fields["set"]["size"] == 3 * len(b"%d" % number * 1000)


def test_kill_leaves_no_request_half_done(tmp_path: Path) -> None:
    stored: list[tuple[str, str, bytes]] = []
    with serve_neptune(tmp_path / "server") as server:
        project = server.project()
        model = make_model(server, project)
        session = server.session()

        def work(number: int) -> None:
            version = make_version(server, project, model)
            for step in range(1000):
                body = hashlib.sha256(f"{number} {step}".encode()).digest() * 20_000
                path = f"{LEADERBOARD}/attributes/file/upload?{upload_query(version, f'files/{step}')}"
                if json.loads(server.send("POST", path, body, session)) == {"errors": []}:
                    stored.append((version, f"files/{step}", hashlib.sha256(body).digest()))
                if len(stored) >= 30:
                    os.kill(server.pid, signal.SIGKILL)

        with ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(work, number) for number in range(4)]
        # The kill stopped every writer in the middle of a request.
        assert all(isinstance(future.exception(), (OSError, HTTPException)) for future in futures)
        server.stop()
        server.start()
        assert len(stored) >= 30
        for version, path, expected in stored:
            assert hashlib.sha256(download(server, version, path)).digest() == expected
    blobs = {path.name: path for path in (tmp_path / "server" / "blobs").glob("*/*")}
    for name, blob in blobs.items():
        assert hashlib.sha256(blob.read_bytes()).hexdigest() == name
    assert list((tmp_path / "server" / "unfinished").iterdir()) == []
    with sqlite3.connect(tmp_path / "server" / "registry.db") as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        # Every field has its file, and every file has a field.
        assert {row[0] for row in db.execute("SELECT sha256 FROM file")} == set(blobs)
        query = "SELECT 1 FROM attribute LEFT JOIN file USING (container, path) WHERE type = 'file'"
        assert db.execute(f"{query} AND sha256 IS NULL").fetchall() == []
    db.close()


def test_backup_of_a_running_server_serves_the_old_state(
    neptune_server: Neptune, neptune_project: str, tmp_path: Path
) -> None:
    version = make_version(neptune_server, neptune_project)
    path = f"{LEADERBOARD}/attributes/file/upload?{upload_query(version, 'f')}"
    neptune_server.call("POST", path, data=b"content")
    copy = tmp_path / "copy"
    copy.mkdir()
    # As in docs/how-to/run-the-neptune-compatible-server.md: the database first, then the files.
    with closing(sqlite3.connect(neptune_server.folder / "registry.db")) as db:
        db.execute(f"VACUUM INTO '{copy / 'registry.db'}'")
    shutil.copytree(neptune_server.folder / "blobs", copy / "blobs")
    neptune_server.call("POST", path, data=b"later content")
    with serve_neptune(copy) as copied:
        assert download(copied, version, "f") == b"content"
    assert download(neptune_server, version, "f") == b"later content"


def test_upload_with_lost_parts_is_not_complete(tmp_path: Path) -> None:
    with serve_neptune(tmp_path / "server") as server:
        version = make_version(server, server.project())
        start = f"{LEADERBOARD}/attributes/file/multipart/start?{upload_query(version, 'f', totalLength=10)}"
        upload = server.call("POST", start)["uploadId"]
        part = f"{LEADERBOARD}/attributes/file/multipart/part?{upload_query(version, 'f', uploadId=upload)}"
        server.call("POST", part, data=b"12345", X_Range="bytes=0-4/10")
        server.stop()
        (server.folder / "unfinished" / upload).unlink()
        server.start()
        server.call("POST", part, data=b"67890", X_Range="bytes=5-9/10")
        finish = f"{LEADERBOARD}/attributes/file/multipart/finish?{upload_query(version, 'f', uploadId=upload)}"
        assert (
            "expected 10 bytes without a gap, got 0"
            in server.call("POST", finish)["errors"][0]["errorDescription"]
        )
