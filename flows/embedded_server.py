"""Prefect's embedded server, with a watcher that ends it when this process ends, even by SIGKILL."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import prefect
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import get_current_settings

from compileflow._process.folders import file_lock
from compileflow.errors import ProcessError

_MOST_STARTS = 3
_ENTRY = (
    "import runpy; from compileflow._process.child_process import end_with_parent; "
    "end_with_parent(); runpy.run_module('uvicorn', run_name='__main__')"
)


class EmbeddedServer(SubprocessASGIServer):
    """Prefect's server process. The first object is the server that Prefect's clients start and share."""

    _starts = 0

    def start(self, timeout: int | None = None) -> None:
        """Start the server. Runs with one home start theirs one after the other: each may change the database."""
        if self.running:
            return
        with file_lock(get_current_settings().home / "start.lock", on_wait=lambda: None):
            super().start(timeout)

    def _run_uvicorn_command(self) -> subprocess.Popen[Any]:
        """Start the server as Prefect does, except that a session of its own and a pipe tie it to this process.

        Raises:
            ProcessError: The server ended too often. Prefect starts it again because its port may be taken.
        """
        if self._starts == _MOST_STARTS:
            raise ProcessError(
                "The embedded Prefect server ended while it started.",
                hint="Check the space on the disk of COMPILEFLOW_HOME, or set PREFECT_API_URL to a server.",
            )
        self._starts += 1
        environment = {
            **os.environ,
            "PREFECT_UI_ENABLED": "0",
            "PREFECT__SERVER_EPHEMERAL": "1",
            "PREFECT__SERVER_FINAL": "1",
            **get_current_settings().to_environment_variables(exclude_unset=True),
        }
        options = {
            "--app-dir": str(Path(prefect.__module_path__).parent),
            "--host": "127.0.0.1",
            "--port": str(self.port),
            "--log-level": "error",
            "--lifespan": "on",
        }
        words = [word for option in options.items() for word in option]
        return subprocess.Popen(
            [sys.executable, "-P", "-c", _ENTRY, *words, "--factory", "prefect.server.api.server:create_app"],
            stdin=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
