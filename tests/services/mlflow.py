"""MLflow for tests: a SQLite file that is migrated once per run, and the server of mlflow."""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from compileflow.errors import RegistryError
from compileflow.registries.mlflow.client import parse_place
from compileflow.testing.shared import make_once, shared_folder

_START_TIMEOUT_S = 60
_EMPTIED = (
    "registered_model_aliases", "model_version_tags", "model_versions", "registered_model_tags",
    "registered_models", "tags", "runs",
)  # fmt: skip


def migrated_file(tmp_path_factory: pytest.TempPathFactory, dest: Path) -> Path:
    """Copy an empty MLflow database to `dest`. A run creates it only once, because that takes MLflow seconds."""
    template = make_once(shared_folder(tmp_path_factory) / "mlflow-template", _migrate) / "mlflow.db"
    return Path(shutil.copyfile(template, dest))


def _migrate(folder: Path) -> None:
    place = parse_place(f"mlflow:sqlite:///{folder / 'mlflow.db'}")
    with place.calls("make a database", refused=RegistryError, unavailable=RegistryError) as client:
        assert list(client.search_registered_models()) == []


@dataclass(frozen=True)
class MlflowServer:
    """A running server, its database and its log."""

    url: str
    database: Path
    log_path: Path

    def empty(self) -> None:
        """Delete all registered models and runs in the database, without using the server."""
        with closing(sqlite3.connect(self.database)) as db, db:
            for table in _EMPTIED:
                db.execute(f"DELETE FROM {table}")  # noqa: S608 - the names are ours


@contextmanager
def serve_mlflow(database: Path) -> Iterator[MlflowServer]:
    """Run `mlflow server` on a free port of 127.0.0.1 until the block ends; files go beside `database`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log_path = database.parent / "server.log"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{database}"]
    command += ["--serve-artifacts", "--artifacts-destination", str(database.parent / "artifacts")]
    # The job runner needs another distribution. Without it, the runner would restart forever.
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=database.parent, env=environment, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(f"{url}/health", process, log_path)
        yield MlflowServer(url, database, log_path)
    finally:
        # The command starts the server as a child process, so the whole group is killed.
        os.killpg(process.pid, 9)
        process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], log_path: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    # The server runs on this machine, so a proxy from the environment must not be used.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        try:
            with opener.open(url, timeout=5):
                return
        except OSError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"mlflow's server did not start: {log_path.read_text()[-2000:]}") from error
            time.sleep(0.1)
