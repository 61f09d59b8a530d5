"""The process of Neptune's client, with a child that only speaks its protocol: deadlines and ends."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from pydantic import SecretStr
from requests.adapters import HTTPAdapter

from compileflow._process.child_process import Overdue
from compileflow.errors import RegistryError, RegistryUnavailableError
from compileflow.registries.neptune import client_child, client_process
from compileflow.registries.neptune.address import read_token
from compileflow.registries.neptune.calls import NeptuneClient
from compileflow.registries.neptune.client_process import ClientProcess, Ended
from compileflow.settings import Settings
from deployments.neptune_server.tokens import make_api_token

CHILD = """
import json, sys, time
say = lambda value: print(json.dumps(value), flush=True)
json.loads(sys.stdin.readline())
say({"ready": True})
for line in sys.stdin:
    request = json.loads(line)
    for _ in range(request["arguments"].get("signs", 0)):
        say({"alive": True})
        time.sleep(0.2)
    if request["operation"] == "hang":
        time.sleep(60)
    if request["operation"] == "die":
        print("last words", file=sys.stderr, flush=True)
        sys.exit(1)
    say({"value": len(line)})
"""
# Larger than the buffer of a pipe.
LARGE = "x" * 200_000


@pytest.fixture
def client_settings(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setattr(client_process, "_ENTRY", CHILD)
    token = SecretStr(make_api_token("http://127.0.0.1:9", "its-key"))
    return Settings(home=settings.home, neptune_api_token=token, neptune_timeout_s=0.7)


@pytest.fixture
def process(client_settings: Settings) -> Iterator[ClientProcess]:
    process = ClientProcess(read_token(client_settings, refused=RegistryError), client_settings)
    yield process
    process.close()
    assert not [path for path in client_settings.work_dir.iterdir() if path.is_dir()]


def test_request_that_the_child_does_not_read_ends_at_the_deadline(process: ClientProcess) -> None:
    assert process.ask("write", {"text": LARGE}, timeout_s=10)["value"] > len(LARGE)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(Overdue):
        process.ask("write", {"text": LARGE}, timeout_s=0.5)
    assert time.monotonic() - started < 3
    assert process.pid is None
    assert "value" in process.ask("write", {}, timeout_s=10)


def test_child_that_goes_on_is_waited_for_and_not_without_end(process: ClientProcess) -> None:
    assert "value" in process.ask("upload", {"signs": 6}, timeout_s=0.7)
    with pytest.raises(Overdue) as caught:
        process.ask("upload", {"signs": 50}, timeout_s=0.7, limit_s=1.0)
    assert caught.value.args == (1.0,)


def test_end_of_the_interpreter_does_not_wait_for_a_call(process: ClientProcess) -> None:
    ended: list[type[BaseException]] = []

    def call() -> None:
        try:
            process.ask("hang", {}, timeout_s=60)
        except Ended as error:
            ended.append(type(error))

    process.ask("write", {}, timeout_s=10)
    thread = threading.Thread(target=call)
    thread.start()
    time.sleep(0.2)
    started = time.monotonic()
    process.close()
    thread.join(10)
    assert time.monotonic() - started < 5
    assert ended == [Ended]


def test_many_threads_get_their_own_answers(process: ClientProcess) -> None:
    sizes: dict[int, int] = {}

    def call(number: int) -> None:
        sizes[number] = process.ask("write", {"text": "x" * number}, timeout_s=10)["value"]

    threads = [threading.Thread(target=call, args=(number,)) for number in range(0, 4000, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    base = sizes[0]
    assert sizes == {number: base + number for number in range(0, 4000, 200)}


def client_for(settings: Settings) -> NeptuneClient:
    return NeptuneClient("team/models", settings, refused=RegistryError, unavailable=RegistryUnavailableError)


def test_client_that_cannot_be_started_is_one_line(
    client_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(RegistryUnavailableError, match="could not be started") as caught:
        client_for(client_settings).project_key()
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    assert list(client_settings.work_dir.iterdir()) == []


def test_logs_of_earlier_processes_are_limited(client_settings: Settings) -> None:
    logs = client_settings.home_dir / "logs"
    logs.mkdir(parents=True)
    for number in range(60):
        (logs / f"neptune-{number}.log").write_text("old")
        os.utime(logs / f"neptune-{number}.log", (number, number))
    (logs / "compile-1.log").write_text("another's")
    with pytest.raises(RegistryUnavailableError, match="ended while") as caught:
        client_for(client_settings)._call("die", "dying")
    assert Path(caught.value.log_path).read_text() == "last words\n"
    assert len(list(logs.glob("neptune-*.log"))) == 20
    assert (logs / "neptune-59.log").exists()
    assert (logs / "compile-1.log").exists()


class SmallBuffers(HTTPAdapter):
    """Limits the kernel's buffers: buffered bytes look as if they were sent."""

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        small = (socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)
        super().init_poolmanager(*arguments, socket_options=[small], **options)


@pytest.fixture
def slow_server() -> Iterator[str]:
    """A server that reads 1.5 MB per second and answers with the number of bytes."""
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        thread = threading.Thread(target=take_slowly, args=(listening,))
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        thread.join()


def take_slowly(listening: socket.socket) -> None:
    connection, _ = listening.accept()
    with connection:
        head, _, body = connection.recv(64 * 1024).partition(b"\r\n\r\n")
        missing = int(head.lower().partition(b"content-length: ")[2].split(b"\r")[0]) - len(body)
        taken = len(body)
        while missing > 0 and (block := connection.recv(64 * 1024)):
            missing -= len(block)
            taken += len(block)
            time.sleep(0.04)
        text = str(taken).encode()
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text))


def test_upload_that_goes_on_slowly_is_neither_cut_nor_silent(
    slow_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Restored at the end of the test.
    monkeypatch.setattr(HTTPAdapter, "send", HTTPAdapter.send)
    signs: list[float] = []
    on_bytes: Callable[[], None] = client_child._throttled(lambda: signs.append(time.monotonic()))
    client_child._bound_requests(0.5, on_bytes)
    body = b"x" * (2 << 20)
    started = time.monotonic()
    with requests.Session() as session:
        session.trust_env = False
        session.mount("http://", SmallBuffers())
        assert session.post(slow_server, data=body).text == str(len(body))
    assert time.monotonic() - started > 1
    assert len(signs) > 5
