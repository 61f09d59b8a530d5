"""The Neptune-compatible server past the client: strangers, senseless requests, many writers, a kill."""

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

from deployments.neptune_server.api import OPERATIONS, ROUTES
from deployments.neptune_server.definitions import DEFINITIONS
from deployments.neptune_server.dispatch import HANDLERS
from deployments.neptune_server.tokens import make_api_token
from tests.services.neptune import ROOT, Neptune, serve_neptune
from tests.services.neptune_calls import (
    LEADERBOARD,
    download,
    field,
    make_model,
    make_version,
    status_of,
    tar_of,
    where,
    write,
)
from tests.services.secrets import NEPTUNE_API_KEY


def test_every_operation_refuses_strangers(neptune_server: Neptune) -> None:
    own = neptune_server.session()["Authorization"]
    forged = f"{own[:-4]}AAAA"
    other = make_api_token(neptune_server.url, "no-such-key")
    for method, path in ROUTES:
        for headers in (
            {},
            {"Authorization": forged},
            {"Authorization": "Bearer x"},
            {"X-Neptune-Api-Token": other},
        ):
            assert status_of(neptune_server, method, path, headers) == 401, path


def test_addresses_in_answers_are_those_of_the_clients_token(
    neptune_server: Neptune, neptune_project: str
) -> None:
    url = "https://registry.example:8443"
    token = {"X-Neptune-Api-Token": neptune_server.token_for(url)}
    config = json.loads(neptune_server.send("GET", "/api/backend/v1/clients/config", None, token))
    assert config["apiUrl"] == url
    given = json.loads(neptune_server.send("GET", "/api/backend/v1/authorization/oauth-token", None, token))
    session = {"Authorization": f"Bearer {given['accessToken']}"}
    version = make_version(neptune_server, neptune_project)
    upload = f"{LEADERBOARD}/attributes/fileset/upload?{where(version, 'set', subPath='a/b')}"
    neptune_server.send("POST", upload, b"x", session)
    asked = f"{LEADERBOARD}/attributes/fileset/zip?experimentId={version}&attribute=set"
    answer = json.loads(neptune_server.send("POST", asked, b"", session))
    assert answer["downloadUrl"].startswith(f"{url}{LEADERBOARD}/")


def test_refresh_wants_a_refresh_token(neptune_server: Neptune) -> None:
    access = neptune_server.session()["Authorization"].removeprefix("Bearer ")
    path = "/auth/realms/neptune/protocol/openid-connect/token"
    for token in ("x", access):
        body = urlencode({"grant_type": "refresh_token", "refresh_token": token}).encode()
        assert status_of(neptune_server, "POST", path, {}, body) == 401


def test_log_holds_neither_keys_nor_what_is_written(neptune_server: Neptune, neptune_project: str) -> None:
    version = make_version(neptune_server, neptune_project)
    write(neptune_server, version, {"path": "field", "assignString": {"value": "what-is-written"}})
    log = neptune_server.log.read_text("utf-8")
    assert f"POST {LEADERBOARD}/attributes/operations 200" in log
    for secret in (NEPTUNE_API_KEY, neptune_server.token, "Bearer", "eyJ", version, "what-is-written"):
        assert secret not in log


def test_operations_handlers_and_definitions_fit_together() -> None:
    assert set(HANDLERS) == set(OPERATIONS)
    assert len(ROUTES) == len(OPERATIONS)
    text = json.dumps([operation.answer for operation in OPERATIONS.values()]) + json.dumps(DEFINITIONS)
    named = {part.partition('"')[0] for part in text.split("#/definitions/")[1:]}
    assert named <= set(DEFINITIONS)


@pytest.mark.parametrize(
    ("operation", "said"),
    [
        ({"path": "sys/stage", "assignString": {"value": "live"}}, "none, staging, production, archived"),
        ({"path": "sys/id", "assignString": {"value": "X"}}, "server's own"),
        ({"path": "s", "assignString": {"value": "x" * 16_385}}, "at most 16384"),
        ({"path": "sys/name", "assignFloat": {"value": 1.0}}, "is of type string"),
        ({"path": "i", "logImages": {"entries": []}}, "no logImages"),
    ],
)
def test_what_a_field_cannot_take_is_said(
    neptune_server: Neptune, neptune_project: str, operation: dict[str, Any], said: str
) -> None:
    version = make_version(neptune_server, neptune_project)
    (error,) = write(neptune_server, version, operation, {"path": "beside", "assignInt": {"value": 1}})
    assert said in error["errorDescription"]
    assert field(neptune_server, version, "int", "beside") == {"value": 1}


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
def test_senseless_operation_is_refused_and_nothing_of_its_request_is_kept(
    neptune_server: Neptune, neptune_project: str, operation: dict[str, Any]
) -> None:
    version = make_version(neptune_server, neptune_project)
    with pytest.raises(urllib.error.HTTPError, match="400") as caught:
        write(neptune_server, version, {"path": "before", "assignInt": {"value": 1}}, operation)
    caught.value.close()
    with pytest.raises(urllib.error.HTTPError, match="404") as caught:
        field(neptune_server, version, "int", "before")
    caught.value.close()


def test_part_that_is_not_what_its_range_says_is_refused(neptune_server: Neptune, neptune_project: str) -> None:
    version = make_version(neptune_server, neptune_project)
    start = f"{LEADERBOARD}/attributes/file/multipart/start?{where(version, 'f', totalLength=10)}"
    upload = neptune_server.call("POST", start)["uploadId"]
    part = f"{LEADERBOARD}/attributes/file/multipart/part?{where(version, 'f', uploadId=upload)}"
    for x_range in ("bytes=0-4/10", "bytes=5-11/10", "bytes=0-5/12", "nothing"):
        with pytest.raises(urllib.error.HTTPError, match="400") as caught:
            neptune_server.call("POST", part, data=b"sixsix", X_Range=x_range)
        assert "Length of stream does not match given range" in caught.value.read().decode()
        caught.value.close()
    finish = f"{LEADERBOARD}/attributes/file/multipart/finish?{where(version, 'f', uploadId=upload)}"
    neptune_server.call("POST", part, data=b"67890", X_Range="bytes=5-9/10")
    assert "0 of 10 bytes" in neptune_server.call("POST", finish)["errors"][0]["errorDescription"]
    neptune_server.call("POST", part, data=b"12345", X_Range="bytes=0-4/10")
    # The reply to the first may be lost: the second says the same.
    assert neptune_server.call("POST", finish) == neptune_server.call("POST", finish) == {"errors": []}
    assert download(neptune_server, version, "f") == b"1234567890"


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b"])
def test_file_set_takes_no_path_that_leads_out_of_it(
    neptune_server: Neptune, neptune_project: str, name: str
) -> None:
    version = make_version(neptune_server, neptune_project)
    upload = f"{LEADERBOARD}/attributes/fileset/upload?{where(version, 'set', subPath=name)}"
    tar = f"{LEADERBOARD}/attributes/fileset/tar?{urlencode({'experimentId': version, 'attribute': 'set'})}"
    for answer in (
        neptune_server.call("POST", upload, data=b"x"),
        neptune_server.call("POST", tar, data=tar_of({"fine": b"y", name: b"x"})),
    ):
        assert name in answer["errors"][0]["errorDescription"]
    # All of a tar or nothing.
    with pytest.raises(urllib.error.HTTPError, match="404") as caught:
        neptune_server.call("POST", f"{LEADERBOARD}/attributes/fileset/zip?experimentId={version}&attribute=set")
    caught.value.close()


def test_twenty_writers_at_once_lose_nothing(neptune_server: Neptune, neptune_project: str) -> None:
    model = make_model(neptune_server, neptune_project)
    session = neptune_server.session()

    def work(number: int) -> tuple[str, str]:
        made = {"projectIdentifier": neptune_project, "parentId": model, "type": "modelVersion"}
        sent = neptune_server.send("POST", f"{LEADERBOARD}/experiments", json.dumps(made).encode(), session)
        version = json.loads(sent)
        for step in range(3):
            operations = [{"path": f"field/{step}", "assignInt": {"value": number}}]
            path = f"{LEADERBOARD}/attributes/operations?experimentId={version['id']}"
            assert neptune_server.send("POST", path, json.dumps(operations).encode(), session) == b"[]"
            path = f"{LEADERBOARD}/attributes/fileset/upload?{where(version['id'], 'set', subPath=f'{step}.bin')}"
            neptune_server.send("POST", path, b"%d" % number * 1000, session)
        return version["id"], version["shortId"]

    with ThreadPoolExecutor(20) as pool:
        made = list(pool.map(work, range(20)))
    assert {short.rpartition("-")[2] for _, short in made} == {str(number) for number in range(1, 21)}
    for number, (version, _) in enumerate(made):
        attributes = neptune_server.call("GET", f"{LEADERBOARD}/attributes/all?experimentId={version}")[
            "attributes"
        ]
        found = {one["name"]: one[f"{one['type']}Properties"] for one in attributes}
        assert [found[f"field/{step}"]["value"] for step in range(3)] == [number] * 3
        assert found["set"]["size"] == 3 * len(b"%d" % number * 1000)


def test_nothing_half_written_is_left_after_a_kill(tmp_path: Path) -> None:
    kept: list[tuple[str, str, bytes]] = []
    with serve_neptune(tmp_path / "server") as server:
        project = server.project()
        model = make_model(server, project)
        session = server.session()

        def work(number: int) -> None:
            version = make_version(server, project, model)
            for step in range(1000):
                body = hashlib.sha256(f"{number} {step}".encode()).digest() * 20_000
                path = f"{LEADERBOARD}/attributes/file/upload?{where(version, f'files/{step}')}"
                if json.loads(server.send("POST", path, body, session)) == {"errors": []}:
                    kept.append((version, f"files/{step}", hashlib.sha256(body).digest()))
                if len(kept) >= 30:
                    os.kill(server.pid, signal.SIGKILL)

        with ThreadPoolExecutor(4) as pool:
            ended = [work_of.exception() for work_of in [pool.submit(work, number) for number in range(4)]]
        # Each was stopped in the middle of something.
        assert all(isinstance(error, (OSError, HTTPException)) for error in ended)
        server.stop()
        server.start()
        assert len(kept) >= 30
        for version, path, expected in kept:
            assert hashlib.sha256(download(server, version, path)).digest() == expected
    blobs = {path.name: path for path in (tmp_path / "server" / "blobs").glob("*/*")}
    for name, blob in blobs.items():
        assert hashlib.sha256(blob.read_bytes()).hexdigest() == name
    assert list((tmp_path / "server" / "unfinished").iterdir()) == []
    with sqlite3.connect(tmp_path / "server" / "registry.db") as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        # Neither a field without its file, nor a file that nothing refers to.
        assert {row[0] for row in db.execute("SELECT sha256 FROM file")} == set(blobs)
        joined = "SELECT 1 FROM attribute LEFT JOIN file USING (container, path) WHERE type = 'file'"
        assert db.execute(f"{joined} AND sha256 IS NULL").fetchall() == []
    db.close()


def test_copy_made_while_the_server_runs_serves_what_was_there(
    neptune_server: Neptune, neptune_project: str, tmp_path: Path
) -> None:
    version = make_version(neptune_server, neptune_project)
    path = f"{LEADERBOARD}/attributes/file/upload?{where(version, 'f')}"
    neptune_server.call("POST", path, data=b"content")
    copy = tmp_path / "copy"
    copy.mkdir()
    # As docs/neptune-server.md says it: the database first, then the files.
    with closing(sqlite3.connect(neptune_server.folder / "registry.db")) as db:
        db.execute(f"VACUUM INTO '{copy / 'registry.db'}'")
    shutil.copytree(neptune_server.folder / "blobs", copy / "blobs")
    neptune_server.call("POST", path, data=b"later content")
    with serve_neptune(copy) as copied:
        assert download(copied, version, "f") == b"content"
    assert download(neptune_server, version, "f") == b"later content"


def test_upload_whose_parts_were_lost_is_not_taken_for_whole(tmp_path: Path) -> None:
    with serve_neptune(tmp_path / "server") as server:
        version = make_version(server, server.project())
        start = f"{LEADERBOARD}/attributes/file/multipart/start?{where(version, 'f', totalLength=10)}"
        upload = server.call("POST", start)["uploadId"]
        part = f"{LEADERBOARD}/attributes/file/multipart/part?{where(version, 'f', uploadId=upload)}"
        server.call("POST", part, data=b"12345", X_Range="bytes=0-4/10")
        server.stop()
        (server.folder / "unfinished" / upload).unlink()
        server.start()
        server.call("POST", part, data=b"67890", X_Range="bytes=5-9/10")
        finish = f"{LEADERBOARD}/attributes/file/multipart/finish?{where(version, 'f', uploadId=upload)}"
        assert "0 of 10 bytes" in server.call("POST", finish)["errors"][0]["errorDescription"]


def test_documented_operations_are_those_there_are() -> None:
    page = (ROOT / "docs" / "neptune-server.md").read_text("utf-8")
    rows = [f"| `{one.name}` | {' '.join(one.route)} | {one.does} |" for one in OPERATIONS.values()]
    assert [
        line for line in page.splitlines() if "| /api/" in line.replace("GET ", "").replace("POST ", "")
    ] == rows


def test_projects_are_made_on_demand_only_where_the_server_was_told_to(
    neptune_server: Neptune, tmp_path: Path
) -> None:
    path = "/api/backend/v1/projects/get?projectIdentifier=demand/first"
    with pytest.raises(urllib.error.HTTPError, match="404") as caught:
        neptune_server.call("GET", path)
    caught.value.close()
    with serve_neptune(tmp_path / "server", "--create-projects") as willing:
        assert willing.call("GET", path)["organizationName"] == "demand"
