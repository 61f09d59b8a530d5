"""A Prefect server for a benchmark, on loopback, with SQLite or Postgres."""

from __future__ import annotations

import os
import pwd
import secrets
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from deployments.postgres import postgres_programs, start_postgres
from deployments.services import Service
from flows.environment import SERVER_SETTINGS

_START_S = 300.0
_DEBIAN = Path("/usr/lib/postgresql")


@contextmanager
def prefect_server(folder: Path, *, database_url: str | None = None) -> Iterator[dict[str, str]]:
    """Run a server and give the environment of its clients.

    Args:
        folder: Folder of its database and logs; made if it is missing.
        database_url: URL of a Postgres database. None: SQLite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    environment = {
        **os.environ,
        **SERVER_SETTINGS,
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_CLI_PROMPT": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
    }
    words = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    database = {} if database_url is None else {"PREFECT_SERVER_DATABASE_CONNECTION_URL": database_url}
    server = Service("server", words, environment=environment | database, log_path=folder / "server.log")
    try:
        server.wait_until(lambda: _answers(environment["PREFECT_API_URL"]), timeout_s=_START_S)
        yield environment
    finally:
        server.stop()


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """Run a new Postgres and give the URL of its database. Root runs it as the user postgres of Debian."""
    folder.mkdir(parents=True)
    if os.geteuid() != 0:
        programs = postgres_programs()
        if programs is None:
            raise SystemExit("Postgres is not installed. Install the package postgresql.")
        service, url = start_postgres(
            programs, folder / "data", password=secrets.token_hex(8), log_path=folder / "postgres.log"
        )
        try:
            yield url
        finally:
            service.stop()
        return
    programs = max(_DEBIAN.glob("*/bin"), default=None)
    if programs is None:
        raise SystemExit("Postgres is not installed. Install the package postgresql.")
    # The user has to reach the folder, which may be below one that only root reads.
    user, data = pwd.getpwnam("postgres"), Path("/tmp") / f"benchmark-{secrets.token_hex(8)}"  # noqa: S108
    data.mkdir(mode=0o700)
    os.chown(data, user.pw_uid, user.pw_gid)
    port = free_port()
    options = ("-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=")
    as_user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": [], "cwd": "/"}
    with (folder / "postgres.log").open("wb") as log:
        initdb = [str(programs / "initdb"), "--auth=trust", "--encoding=UTF8", "--locale=C", f"--pgdata={data}"]
        subprocess.run(initdb, stdout=log, stderr=log, check=True, **as_user)
        words = [str(programs / "postgres"), "-D", str(data), "-p", str(port), *options]
        process = subprocess.Popen(words, stdout=log, stderr=log, **as_user)
        try:
            ready = [str(programs / "pg_isready"), "--quiet", "--host=127.0.0.1", f"--port={port}"]
            while subprocess.run(ready).returncode:
                if process.poll() is not None:
                    raise SystemExit(f"Postgres ended: see {folder / 'postgres.log'}")
            yield f"postgresql+asyncpg://postgres@127.0.0.1:{port}/postgres"
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()
            subprocess.run(["rm", "-r", str(data)], check=False)  # noqa: S607


def processor_s() -> float:
    """Return the processor time of all processes that this one has started, and of this one."""
    times = [psutil.Process().cpu_times()]
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            times.append(child.cpu_times())
    return sum(time.user + time.system + time.children_user + time.children_system for time in times)


def free_port() -> int:
    """Return a free port of loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def _answers(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with suppress(OSError), opener.open(f"{url}/health", timeout=10):
        return True
    return False
