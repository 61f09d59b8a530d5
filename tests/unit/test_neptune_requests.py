"""Requests that no client sends: the Neptune-compatible server refuses each, in bounded time and memory."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compileflow._process.child_process import peak_bytes
from deployments.neptune_server.api import BACKEND, LEADERBOARD, OPERATIONS
from tests.services.neptune import WORKSPACE, Neptune, serve_neptune

PROJECT = f"{WORKSPACE}/first"
REFRESH = "/auth/realms/neptune/protocol/openid-connect/token"
SEARCH = f"{LEADERBOARD}/leaderboard/entries/search?projectIdentifier={quote(PROJECT)}&type=model"
OPERATE = f"{LEADERBOARD}/attributes/operations?experimentId="
# Some values are close to those that the client sends, and some have an extreme size.
TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ["", "\ud800", "\0", "9" * 30, "-1", "a" * 300, "../x", PROJECT, "2999-13-01", "`s`:string =~ '('"]
    ),
)
NAMES = (
    *("query", "sorting", "sortBy", "name", "pagination", "limit", "offset", "attributeFilters", "path", "value"),
    *("assignString", "assignInt", "assignDatetime", "valueMilliseconds", "logFloats", "entries", "files"),
    *("projectIdentifier", "type", "key", "organizationId"),
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS),
    lambda values: st.one_of(
        st.lists(values, max_size=3),
        st.dictionaries(
            st.sampled_from(NAMES),
            values,
            max_size=4,
        ),
    ),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Neptune]:
    with serve_neptune(tmp_path_factory.mktemp("requests") / "server") as running:
        yield running


def send(server: Neptune, method: str, path: str, body: bytes = b"", **headers: str) -> int:
    """Send one request and return the status of the response."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=30)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        response.read()
        return response.status
    finally:
        connection.close()


def test_any_call_with_any_body_is_no_internal_error(server: Neptune) -> None:
    session = server.session()

    @settings(
        max_examples=300, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(st.sampled_from(sorted(OPERATIONS)), st.data(), JSON)
    def check(call: tuple[str, str], data: st.DataObject, body: Any) -> None:
        method, path = call
        names = [name for name in OPERATIONS[call].parameters if name.isidentifier()]
        query = {name: data.draw(TEXTS, label=name) for name in names if data.draw(st.booleans())}
        words = "&".join(f"{name}={quote(value, errors='surrogatepass')}" for name, value in query.items())
        encoded = json.dumps(body).encode() if method == "POST" else b""
        assert send(server, method, f"{path}?{words}", encoded, **session) < 500
        assert send(server, "GET", "/health") == 200

    check()
    assert " ERROR " not in server.log.read_text("utf-8")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (SEARCH, b"{"),
        (SEARCH, b"[" * 100_000),
        (SEARCH, b"\xff"),
        (SEARCH, b'{"query": "text"}'),
        (SEARCH, b'{"pagination": {"limit": "many"}}'),
        (SEARCH, b'{"query": {"query": "t:datetime > \'-9999999999999d\'"}}'),
        (SEARCH, b'{"query": {"query": "t:datetime > \'0001-01-01T00:00+23:59\'"}}'),
        (f"{OPERATE}no-such", b'[{"path": 1}]'),
        (f"{BACKEND}/projects", b'{"organizationId": {}, "name": []}'),
    ],
)
def test_malformed_body_is_refused(server: Neptune, path: str, body: bytes) -> None:
    assert 400 <= send(server, "POST", path, body, **server.session()) < 500


@pytest.mark.parametrize("token", ["", "x", "\xe9", "W10=", "Ww==", "a.b.c", "[" * 30_000])
def test_malformed_token_is_refused(server: Neptune, token: str) -> None:
    assert send(server, "GET", f"{BACKEND}/authorization/oauth-token", X_Neptune_Api_Token=token) == 401
    assert send(server, "GET", f"{BACKEND}/organizations", Authorization=f"Bearer {token}") == 401
    assert send(server, "POST", REFRESH, f"refresh_token={quote(token)}".encode()[:10_000]) == 401


@pytest.mark.parametrize("length", ["-1", "x", "9" * 5000, "1e3", "\u00b2"])
def test_malformed_length_is_refused(server: Neptune, length: str) -> None:
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
        connection.sendall(f"POST {REFRESH} HTTP/1.1\r\nContent-Length: {length}\r\n\r\n".encode("latin-1"))
        assert connection.recv(1000).startswith(b"HTTP/1.1 400 ")


def test_body_without_a_token_is_not_kept(server: Neptune) -> None:
    before = peak_bytes(server.pid)
    assert send(server, "POST", REFRESH, bytes(100 << 20)) == 413
    assert peak_bytes(server.pid) - before < 20 << 20


def test_regular_expression_does_not_hold_up_the_server(server: Neptune) -> None:
    project = server.call("GET", f"{BACKEND}/projects/get?projectIdentifier={quote(PROJECT)}")["id"]
    order = {"projectIdentifier": project, "type": "model", "key": "REGEX"}
    model = server.call("POST", f"{LEADERBOARD}/experiments", order)["id"]
    server.call("POST", f"{OPERATE}{model}", [{"path": "s", "assignString": {"value": "a" * 40 + "!"}}])
    # Python's own engine would try 2 ** 40 ways.
    found = server.call("POST", SEARCH, {"query": {"query": '`s`:string =~ "(a+)+$"'}})
    assert found["matchingItemCount"] == 0
