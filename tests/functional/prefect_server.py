"""A real Prefect server and worker on loopback, for as long as a test needs them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class PrefectServer:
    """Where the server is, and the environment that its clients need."""

    api_url: str
    environment: dict[str, str]
    logs: Path

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        """Send one request to the API; return the status and the decoded answer."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(  # noqa: S310 - the URL is our own server's
            f"{self.api_url}{path}", data, {"Content-Type": "application/json"}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
                return answer.status, json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read() or b"null")

    def prefect(self, *words: str) -> str:
        """Run the prefect command in the repository's root and return what it printed."""
        done = subprocess.run(
            [sys.executable, "-m", "prefect", *words],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @contextmanager
    def worker(self, pool: str) -> Iterator[None]:
        """Run a worker of a work pool."""
        with self._process("worker", "worker", "start", "--pool", pool, "--name", "test-worker"):
            yield

    @contextmanager
    def _process(self, name: str, *words: str) -> Iterator[subprocess.Popen[bytes]]:
        with (self.logs / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "prefect", *words],
                cwd=ROOT,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                yield process
            finally:
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(timeout=30)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


@contextmanager
def running_server(folder: Path, environment: dict[str, str]) -> Iterator[PrefectServer]:
    """Start a server on a free port and wait until it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "prefect").mkdir()
    url = f"http://127.0.0.1:{port}/api"
    own = os.environ | environment
    own |= {
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_API_URL": url,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PREFECT_CLI_PROMPT": "false",
        "NO_COLOR": "1",
    }
    server = PrefectServer(url, own, folder)
    words = ("server", "start", "--host", "127.0.0.1", "--port", str(port))
    with server._process("server", *words) as process:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None, (folder / "server.log").read_text()
            try:
                if server.call("GET", "/health")[0] == 200:
                    break
            except (urllib.error.URLError, ConnectionError):
                assert time.monotonic() < deadline, (folder / "server.log").read_text()
            time.sleep(0.3)
        yield server
