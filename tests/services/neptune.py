"""A Neptune-compatible server that runs in a separate process while tests need it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from deployments.neptune_server.__main__ import API_KEY_VARIABLE
from deployments.neptune_server.api import BACKEND
from deployments.neptune_server.tokens import make_api_token
from tests.services.secrets import NEPTUNE_API_KEY

ROOT = Path(__file__).parents[2]
WORKSPACE = "tests"
_WAIT_S = 30


class Neptune:
    """The server: its folder, its process, and the settings of its clients."""

    def __init__(self, folder: Path, *options: str):
        self.folder = folder
        self.log = folder.parent / f"{folder.name}.log"
        self.url = ""
        self._options = options
        self._process: subprocess.Popen[str] | None = None

    @property
    def token(self) -> str:
        """The value of NEPTUNE_API_TOKEN for a client."""
        return self.token_for(self.url)

    @property
    def pid(self) -> int:
        """The id of the server's process."""
        assert self._process is not None
        return self._process.pid

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a client's process: the token, permission to use plain http, and no proxy."""
        return {
            "NEPTUNE_API_TOKEN": self.token,
            "OAUTHLIB_INSECURE_TRANSPORT": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    def token_for(self, url: str) -> str:
        """Return a token for clients that reach this server at `url`, the address of a proxy."""
        return make_api_token(url, NEPTUNE_API_KEY)

    def start(self) -> None:
        """Start the server; after `stop`, it starts on the same port."""
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

    def stop(self) -> int:
        """End the server with SIGTERM and return its exit status."""
        assert self._process is not None
        assert self._process.stdout is not None
        self._process.terminate()
        try:
            return self._process.wait(_WAIT_S)
        finally:
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()
            self._process = None

    @property
    def running(self) -> bool:
        """Whether the server's process exists."""
        return self._process is not None

    def project(self, name: str = "project") -> str:
        """Create a project with a unique name and return it as "workspace/name"."""
        unique_name = f"{name}-{uuid4().hex[:8]}"
        self.call("POST", f"{BACKEND}/projects", {"organizationId": WORKSPACE, "name": unique_name})
        return f"{WORKSPACE}/{unique_name}"

    def call(self, method: str, path: str, body: Any = None, *, data: bytes | None = None, **headers: str) -> Any:
        """Send one request without the client, in a new session; return the decoded response.

        Raises:
            urllib.error.HTTPError: The server refused the request.
        """
        extra_headers = {name.replace("_", "-"): value for name, value in headers.items()}
        encoded_body = json.dumps(body).encode() if data is None else data
        return json.loads(self.send(method, path, encoded_body, self.session() | extra_headers) or b"null")

    def session(self) -> dict[str, str]:
        """Exchange the API token; return the header that authorizes other requests."""
        api_token = {"X-Neptune-Api-Token": self.token}
        tokens = json.loads(self.send("GET", f"{BACKEND}/authorization/oauth-token", None, api_token))
        return {"Authorization": f"Bearer {tokens['accessToken']}"}

    def send(self, method: str, path: str, data: bytes | None, headers: dict[str, str]) -> bytes:
        """Send one request unchanged; return the body of the response."""
        request = urllib.request.Request(self.url + path, data, headers, method=method)  # noqa: S310 - our own server
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=_WAIT_S) as response:
            return bytes(response.read())


@contextmanager
def serve_neptune(folder: Path, *options: str) -> Iterator[Neptune]:
    """Run a server on a free port until the block ends. Its log is beside its folder, as NAME.log."""
    server = Neptune(folder, *options)
    server.start()
    try:
        yield server
    finally:
        if server.running:
            server.stop()


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until a condition is true."""
    deadline = time.monotonic() + _WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
