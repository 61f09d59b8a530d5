"""A Neptune-compatible server in a process of its own, for as long as tests need it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from deployments.neptune_server.__main__ import API_KEY_VARIABLE
from deployments.neptune_server.tokens import make_api_token
from tests.services.secrets import NEPTUNE_API_KEY

ROOT = Path(__file__).parents[2]
WORKSPACE = "tests"
_WAIT_S = 30


class Neptune:
    """The server: its folder, its process, and what its clients need to know."""

    def __init__(self, folder: Path, *options: str):
        self.folder = folder
        self.log = folder.parent / f"{folder.name}.log"
        self.url = ""
        self._options = options
        self._process: subprocess.Popen[str] | None = None

    @property
    def token(self) -> str:
        """What a client has in NEPTUNE_API_TOKEN."""
        return self.token_for(self.url)

    @property
    def pid(self) -> int:
        """The server's process."""
        assert self._process is not None
        return self._process.pid

    @property
    def environment(self) -> dict[str, str]:
        """What a client's process has in its environment: the token, and that plain http will do."""
        return {
            "NEPTUNE_API_TOKEN": self.token,
            "OAUTHLIB_INSECURE_TRANSPORT": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    def token_for(self, url: str) -> str:
        """Return a token with which clients reach this server at `url`, a proxy in front of it."""
        return make_api_token(url, NEPTUNE_API_KEY)

    def start(self) -> None:
        """Start the server; again after `stop`, it is at the same port."""
        port = self.url.rpartition(":")[2] or "0"
        with self.log.open("a") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "deployments.neptune_server", "--root", str(self.folder)),
                    *("--port", port, "--project", f"{WORKSPACE}/first", "--verbose", *self._options),
                ],
                cwd=ROOT,
                env=os.environ | {API_KEY_VARIABLE: NEPTUNE_API_KEY},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self._process.stdout is not None
        words = self._process.stdout.readline().split()
        assert words, self.log.read_text("utf-8")
        self.url = next(word for word in words if word.startswith("http")).rstrip(",")

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """End the server and return its exit status."""
        assert self._process is not None
        assert self._process.stdout is not None
        self._process.send_signal(how)
        try:
            return self._process.wait(_WAIT_S)
        finally:
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()
            self._process = None

    @property
    def running(self) -> bool:
        """Whether there is a process."""
        return self._process is not None

    def project(self, name: str = "project") -> str:
        """Make a project that nobody else uses and return it as "workspace/name"."""
        fresh = f"{name}-{uuid4().hex[:8]}"
        self.call("POST", "/api/backend/v1/projects", {"organizationId": WORKSPACE, "name": fresh})
        return f"{WORKSPACE}/{fresh}"

    def call(self, method: str, path: str, body: Any = None, *, data: bytes | None = None, **headers: str) -> Any:
        """Send one request without the client, with a session of its own; return the decoded answer.

        Raises:
            urllib.error.HTTPError: the server refused.
        """
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        sent = json.dumps(body).encode() if data is None else data
        return json.loads(self.send(method, path, sent, self.session() | named) or b"null")

    def session(self) -> dict[str, str]:
        """Exchange the token; return the header that goes with other requests."""
        given = {"X-Neptune-Api-Token": self.token}
        answer = json.loads(self.send("GET", "/api/backend/v1/authorization/oauth-token", None, given))
        return {"Authorization": f"Bearer {answer['accessToken']}"}

    def send(self, method: str, path: str, data: bytes | None, headers: dict[str, str]) -> bytes:
        """Send one request as it is; return the answer's body."""
        request = urllib.request.Request(self.url + path, data, headers, method=method)  # noqa: S310 - our own server
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=_WAIT_S) as answer:
            return bytes(answer.read())


@contextmanager
def serve_neptune(folder: Path, *options: str) -> Iterator[Neptune]:
    """Run a server on a free port until the block ends; its folder is kept, its log beside it as NAME.log."""
    server = Neptune(folder, *options)
    server.start()
    try:
        yield server
    finally:
        if server.running:
            server.stop()
