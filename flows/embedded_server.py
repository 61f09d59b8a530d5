"""The Prefect server of a run that has none: a process that ends with this one, even by SIGKILL.

Prefect would start such a process itself. It would first import the whole server in the client, and then wait for
the process where the client could go on.
"""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

from compileflow._process.child_process import end_with_parent, skip_slow_grammar
from compileflow._process.folders import file_lock
from compileflow.errors import ProcessError

_LOOK_S = 0.05
_ANSWER_S = 10.0
_END_S = 5.0
_ENVIRONMENT = {
    "PREFECT_UI_ENABLED": "0",
    "PREFECT__SERVER_EPHEMERAL": "1",
    "PREFECT__SERVER_FINAL": "1",
    # A block type is registered when a block of it is saved. Without this, each start imports all collections.
    "PREFECT_MEMOIZE_BLOCK_AUTO_REGISTRATION": "false",
    "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",
}


class EmbeddedServer:
    """A server process on loopback. Create it early: it starts while this process does other things.

    Args:
        home: Folder of Prefect, with the server's database.
        environment: Prefect's settings for the server, as environment variables.
        timeout_s: Limit of the start, in seconds.
    """

    def __init__(self, home: Path, environment: dict[str, str], *, timeout_s: float) -> None:
        self._deadline = time.monotonic() + timeout_s
        with socket.socket() as port:
            port.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{port.getsockname()[1]}/api"
            # A session of its own and the pipe tie the server to this process.
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(port.fileno()), str(home / "start.lock")],
                stdin=subprocess.PIPE,
                env={**os.environ, **environment, **_ENVIRONMENT},
                pass_fds=[port.fileno()],
                start_new_session=True,
            )

    def wait(self) -> None:
        """Wait until the server answers.

        Raises:
            ProcessError: It ended, or it does not answer in time.
        """
        # A proxy of the environment does not reach this machine's loopback.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while self._process.poll() is None and time.monotonic() < self._deadline:
            with suppress(OSError), opener.open(f"{self.url}/health", timeout=_ANSWER_S):
                return
            time.sleep(_LOOK_S)
        outcome = "does not answer" if self._process.poll() is None else "ended while it started"
        self.stop()
        raise ProcessError(
            f"The embedded Prefect server {outcome}.",
            hint="Check the space on the disk of COMPILEFLOW_HOME, or set PREFECT_API_URL to a server.",
        )

    def stop(self) -> None:
        """End the server, after it has written what it knows."""
        self._process.terminate()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
        # Closes the pipe.
        self._process.communicate()


def serve(handle: int, lock: Path) -> None:
    """Serve on a bound socket until SIGTERM. Servers with one home start one after the other.

    Args:
        handle: File descriptor of the socket.
        lock: Lock file of the start, which may change the database.
    """
    skip_slow_grammar()
    # The import makes many objects and no garbage; looking for garbage takes a quarter of its time.
    gc.disable()
    import uvicorn
    from prefect.server.api.server import create_app

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            with file_lock(lock, on_wait=lambda: None):
                await super().startup(sockets)

    config = uvicorn.Config(create_app, factory=True, log_level="error", lifespan="on")
    config.load()
    gc.freeze()
    gc.enable()
    Server(config).run([socket.socket(fileno=handle)])


if __name__ == "__main__":
    end_with_parent()
    serve(int(sys.argv[1]), Path(sys.argv[2]))
