"""The examples that start a run over the API: one key for all tries, and errors in one line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from tests.services.example_process import FOLDER
from tests.services.http_server import answer, serving

PYTHON = [sys.executable, str(FOLDER / "start_run.py"), "/srv/model", "--name", "reviews"]
SHELL = ["sh", str(FOLDER / "start_run.sh"), "/srv/model", "reviews"]


def call(words: list[str], url: str | None) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
    variables |= {} if url is None else {"PREFECT_API_URL": url}
    return subprocess.run(words, env=variables, capture_output=True, text=True, timeout=60)


@contextmanager
def busy_server(bodies: list[Any]) -> Iterator[str]:
    """A server with one deployment, which answers the first request for a run with 503. A run ends at once."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state = {"type": "COMPLETED", "name": "Completed", "message": None}
            self.answer_json(200, {"id": "d-1"} if "deployments" in self.path else {"state": state})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path.endswith("/artifacts/filter"):
                found = [
                    {"key": "reviews-onnx-runtime-version", "description": "reviews version 3, verdict pass"},
                    {"key": "reviews-onnx-runtime-figures", "description": "Figures"},
                    {"key": "reviews-onnx-runtime-report", "description": "pass: all 5 gates passed"},
                    {"key": None, "description": None},
                ]
                self.answer_json(200, found)
            else:
                bodies.append(body)
                self.answer_json(503 if len(bodies) == 1 else 201, {"id": "r-1"})

        def answer_json(self, status: int, value: Any) -> None:
            # Without spaces, because the example for the shell reads it with sed.
            answer(self, status, json.dumps(value, separators=(",", ":")).encode())

    with serving(Answers) as url:
        yield f"{url}/api"


@pytest.mark.parametrize("words", [PYTHON, SHELL])
def test_request_that_is_sent_again_has_the_same_key(words: list[str]) -> None:
    bodies: list[Any] = []
    with busy_server(bodies) as url:
        done = call(words, url)
    assert done.returncode == 0, done.stderr
    first, second = bodies
    assert first == second
    assert re.fullmatch(r"[0-9a-f-]{32,36}", first["idempotency_key"])
    request = {"model": "/srv/model", "name": "reviews"}
    assert request.items() <= first["parameters"]["request"].items()
    if words == PYTHON:
        assert done.stdout.splitlines()[-1] == (
            "Completed: pass: all 5 gates passed; reviews version 3, verdict pass"
        )


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, " refuses the login. Set PREFECT_API_AUTH_STRING to USER:PASSWORD."),
        (404, " is not the API of a Prefect server; PREFECT_API_URL usually ends in /api."),
        (409, 'answered 409: {"detail":"Not Found"}'),
    ],
)
def test_refusal_of_the_server_says_what_to_set(status: int, message: str) -> None:
    class Refusal(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self, status, b'{"detail":"Not Found"}')

    with serving(Refusal) as url:
        done = call(PYTHON, url)
    assert done.returncode == 1
    assert done.stderr.endswith(f"{message}\n")
    assert done.stderr.count("\n") == 1


def test_script_without_a_name_says_how_to_call_it() -> None:
    done = call(SHELL[:3], "http://127.0.0.1:1/api")
    assert (done.returncode, done.stderr) == (2, f"usage: sh {SHELL[1]} MODEL NAME\n")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (None, "PREFECT_API_URL is not set. Set it to the API of the Prefect server, for example "),
        # Nothing listens on port 1.
        ("http://127.0.0.1:1/api", "The Prefect server at http://127.0.0.1:1/api/ does not answer: "),
        ("http://u:secret@127.0.0.1:1/api", "The Prefect server at http://127.0.0.1:1/api/ does not answer: "),
        ("localhost", "PREFECT_API_URL does not begin with http:// or https://."),
        ("http://127.0.0.1:abc/api", "PREFECT_API_URL is not a URL: Invalid port: 'abc'."),
    ],
)
def test_server_that_cannot_be_used_is_one_line(url: str | None, message: str) -> None:
    done = call(PYTHON, url)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1
