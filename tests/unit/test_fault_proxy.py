"""Each fault of the proxy has its effect on a real client, and no other."""

from __future__ import annotations

import http.client
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from urllib.parse import urlsplit

import pytest

from tests.services.fault_proxy import Answer, Corrupt, CutRequest, CutResponse, FaultProxy, Hang, LoseReply
from tests.services.http_server import answer, serving

BODY = bytes(range(256)) * 2000


class _Echo(BaseHTTPRequestHandler):
    """Replies with the body of the request, and records it."""

    protocol_version = "HTTP/1.1"
    bodies: list[bytes]

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.bodies.append(body)
        answer(self, 200, body)


@pytest.fixture
def bodies() -> list[bytes]:
    return []


@pytest.fixture
def proxy(bodies: list[bytes]) -> Iterator[FaultProxy]:
    with serving(type("Echo", (_Echo,), {"bodies": bodies})) as url, FaultProxy(url) as started:
        yield started


@contextmanager
def connection(proxy: FaultProxy) -> Iterator[http.client.HTTPConnection]:
    parts = urlsplit(proxy.url)
    opened = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=10)
    try:
        yield opened
    finally:
        opened.close()


def put(opened: http.client.HTTPConnection, path: str = "/a?b=c", body: object = BODY) -> tuple[int, bytes]:
    opened.request("PUT", path, body=body)
    reply = opened.getresponse()
    return reply.status, reply.read()


def test_without_a_fault_everything_passes_on_one_connection(proxy: FaultProxy, bodies: list[bytes]) -> None:
    with connection(proxy) as opened:
        assert [put(opened), put(opened)] == [(200, BODY)] * 2
    assert [(request.method, request.path, request.body_size) for request in proxy.seen] == [
        ("PUT", "/a?b=c", len(BODY))
    ] * 2
    assert bodies == [BODY] * 2


def test_cut_request_never_reaches_the_server(proxy: FaultProxy, bodies: list[bytes]) -> None:
    proxy.inject(CutRequest(after_bytes=1000))
    with connection(proxy) as opened, pytest.raises(ConnectionError):
        put(opened)
    assert bodies == []
    assert [request.body_size for request in proxy.seen] == [1000]


def test_lost_reply_comes_after_the_server_did_it(proxy: FaultProxy, bodies: list[bytes]) -> None:
    proxy.inject(LoseReply())
    with connection(proxy) as opened, pytest.raises(ConnectionError):
        put(opened)
    assert bodies == [BODY]


def test_cut_reply_ends_before_its_length(proxy: FaultProxy) -> None:
    proxy.inject(CutResponse(after_bytes=1000))
    with connection(proxy) as opened, pytest.raises((ConnectionError, http.client.IncompleteRead)):
        put(opened)


def test_corrupted_reply_differs_in_one_byte(proxy: FaultProxy) -> None:
    proxy.inject(Corrupt())
    with connection(proxy) as opened:
        assert put(opened) == (200, b"\xff" + BODY[1:])
        assert put(opened) == (200, BODY)


def test_answer_is_given_without_the_server(proxy: FaultProxy, bodies: list[bytes]) -> None:
    proxy.inject(Answer(503, b"slow down", {"Retry-After": "1"}))
    with connection(proxy) as opened:
        assert put(opened) == (503, b"slow down")
        assert put(opened) == (200, BODY)
    assert bodies == [BODY]


def test_hung_request_is_answered_when_its_time_is_over(proxy: FaultProxy) -> None:
    proxy.inject(Hang(seconds=0.3))
    began = time.monotonic()
    with connection(proxy) as opened:
        assert put(opened) == (200, BODY)
    assert time.monotonic() - began >= 0.3


def test_fault_applies_only_to_matching_requests(proxy: FaultProxy) -> None:
    proxy.inject(Answer(500), method="GET", times=9)
    proxy.inject(Answer(500), path="/other", times=9)
    proxy.inject(Answer(418), path="b=c", times=2, skip=1)
    with connection(proxy) as opened:
        assert [put(opened)[0] for _ in range(4)] == [200, 418, 418, 200]
        assert put(opened, "/other")[0] == 500


def test_server_that_is_down_is_a_reset() -> None:
    with FaultProxy("http://127.0.0.1:9") as proxy, connection(proxy) as opened, pytest.raises(ConnectionError):
        put(opened)
