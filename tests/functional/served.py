"""A running `make serve`, and what tests need of it."""

from __future__ import annotations

import base64
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.functional.prefect_server import answer_to

ROOT = Path(__file__).parents[2]
RUN_S = 240


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def environment(home: Path) -> dict[str, str]:
    return os.environ | {"COMPILEFLOW_HOME": str(home), "PREFECT_WORKER_QUERY_SECONDS": "1"}


@dataclass
class Served:
    """A running `python -m deployments.serve`."""

    home: Path
    port: int
    process: subprocess.Popen[str]
    output: str = ""

    @property
    def client_environment(self) -> dict[str, str]:
        """What the file for clients exports."""
        text = (self.home / "serve" / "client.env").read_text("utf-8")
        return dict(line.removeprefix("export ").split("=", 1) for line in text.splitlines())

    def wait_ready(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line
            if line.startswith("Ready."):
                return
        raise AssertionError(self.output)

    def call(self, method: str, path: str, body: Any = None, *, login: bool = True) -> tuple[int, Any]:
        """Send a request to the API, and return the status and the decoded answer."""
        variables = self.client_environment
        words = base64.b64encode(variables["PREFECT_API_AUTH_STRING"].encode()).decode()
        headers = {"Authorization": f"Basic {words}"} if login else {}
        return answer_to(f"{variables['PREFECT_API_URL']}{path}", method, body, headers)

    def run_of(self, name: str, *states: str) -> dict[str, Any]:
        """Wait until the run of this name is in one of the states, and return it."""
        filtered = {"flow_runs": {"name": {"any_": [name]}, "state": {"name": {"any_": [*states]}}}}
        runs = eventually(lambda: self.call("POST", "/flow_runs/filter", filtered)[1], f"{name} is not {states}")
        run: dict[str, Any] = runs[0]
        return run

    def answers(self) -> bool:
        """Return whether the server answers."""
        try:
            return self.call("GET", "/admin/version")[0] == 200
        except OSError:
            return False

    def deployment_id(self) -> str:
        status, answer = self.call("GET", "/deployments/name/compile-model/compile-model")
        assert status == 200, answer
        return str(answer["id"])

    def deploy(self, prefect_file: Path) -> str:
        words = [sys.executable, "-m", "deployments.deploy", "--prefect-file", str(prefect_file)]
        done = subprocess.run(
            words, cwd=ROOT, env=environment(self.home) | self.client_environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def processes(self) -> list[str]:
        """Command lines of all processes that have this home in their environment, except this one."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("COMPILEFLOW_HOME") == str(self.home):
                    found.append(" ".join(process.cmdline()))
            except psutil.Error:
                continue
        return found


def serve(
    home: Path, port: int, database: str = "sqlite", *, prefix: Sequence[str] = (), **variables: str
) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "deployments.serve", "--port", str(port), "--database", database]
    return subprocess.Popen(
        [*prefix, *words],
        cwd=ROOT,
        env=environment(home) | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def eventually(condition: Callable[[], Any], what: str, timeout_s: float = RUN_S) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.5)
    return value
