"""A real Prefect server on loopback, one for a whole test run, and workers for as long as a test needs them."""

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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

ROOT = Path(__file__).parents[2]


def answer_to(
    url: str, method: str, body: Any = None, headers: Mapping[str, str] | None = None
) -> tuple[int, Any]:
    """Send a request to our own server, again after a 503 as Prefect does, and return the status and the answer.

    The server answers 503 while its SQLite file is locked, or a minute long not at all, both on a busy machine.
    """
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **(headers or {})}
    request = urllib.request.Request(url, data, headers, method=method)  # noqa: S310 - the URL is our own server's
    for _ in range(5):
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:  # noqa: S310
                return reply.status, json.loads(reply.read() or b"null")
        except urllib.error.HTTPError as error:
            with error:
                status, answer = error.code, json.loads(error.read() or b"null")
        except TimeoutError:
            if method != "GET":
                raise
            status, answer = 503, None
        if status != 503:
            break
        time.sleep(2)
    return status, answer


@dataclass(frozen=True)
class PrefectServer:
    """Where the server is, and the environment that its clients need."""

    api_url: str
    environment: dict[str, str]
    logs: Path

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        """Send a request to the API, and return the status and the decoded answer."""
        return answer_to(f"{self.api_url}{path}", method, body)

    def prefect(self, *words: str) -> str:
        """Run the prefect command in the repository's root and return what it printed."""
        return self.python("prefect", *words)

    def python(self, module: str, *words: str) -> str:
        """Run a module as a program in the repository's root and return what it printed."""
        done = subprocess.run(
            [sys.executable, "-m", module, *words],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @contextmanager
    def worker(self, pool: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run a worker of a work pool."""
        with self._process("worker", "worker", "start", "--pool", pool, "--name", "test-worker") as process:
            yield process

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
                # A test may have killed it.
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(timeout=10)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


@contextmanager
def shared_server(folder: Path) -> Iterator[PrefectServer]:
    """Give the one server of a test run: whoever asks first starts it, and the last who leaves ends it.

    A start takes longer than any flow of the tests, as it makes a database with Prefect's whole history.

    Args:
        folder: The same for all of the run's processes, for this alone.
    """
    running, users = folder / "running.json", folder / "users"
    users.mkdir(parents=True, exist_ok=True)
    own = users / str(os.getpid())
    with FileLock(folder / "lock"):
        if not running.exists():
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            pid = _start(_server_on(port, folder), port)
            running.write_text(json.dumps({"port": port, "pid": pid}), "utf-8")
        own.touch()
    found = json.loads(running.read_text("utf-8"))
    try:
        yield _server_on(found["port"], folder)
    finally:
        with FileLock(folder / "lock"):
            own.unlink()
            # A worker of pytest that was killed has not signed off.
            if not any(Path(f"/proc/{user.name}").exists() for user in users.iterdir()):
                running.unlink()
                os.killpg(found["pid"], signal.SIGKILL)


def _server_on(port: int, folder: Path) -> PrefectServer:
    url = f"http://127.0.0.1:{port}/api"
    own = os.environ | {
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_API_URL": url,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        # Small and frequent writes lock the SQLite file for long.
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "100",
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "100",
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
        "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_BATCH_SIZE": "500",
        "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_READ_BATCH_SIZE": "100",
        "PREFECT_CLI_PROMPT": "false",
        "NO_COLOR": "1",
    }
    return PrefectServer(url, own, folder)


def _start(server: PrefectServer, port: int) -> int:
    """Start the server's process, wait until it answers, and return the process's number."""
    log = server.logs / "server.log"
    words = ("-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port))
    to_log = (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    # Popen would complain of a process that outlives the worker which started it.
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, *words],
        server.environment,
        file_actions=[to_log, (os.POSIX_SPAWN_DUP2, 1, 2)],
        setpgroup=0,
    )
    deadline = time.monotonic() + 120
    while True:
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), log.read_text()
        try:
            if server.call("GET", "/health")[0] == 200:
                return pid
        except (urllib.error.URLError, ConnectionError) as error:
            if time.monotonic() > deadline:
                os.killpg(pid, signal.SIGKILL)
                raise AssertionError(log.read_text()) from error
        time.sleep(0.3)
