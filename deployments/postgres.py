"""A Postgres database for the Prefect server, from the programs that Debian's package installs."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

from compileflow.errors import ProcessError
from deployments.services import Service

_DEBIAN = Path("/usr/lib/postgresql")
_USER = "prefect"
_START_S = 60.0


def postgres_programs() -> Path | None:
    """Return the folder of Postgres's programs, the newest version's; None if there is none or this user is root.

    Postgres refuses to run as root.
    """
    if os.geteuid() == 0:
        return None
    versions = [folder for folder in _DEBIAN.glob("*/bin") if (folder / "postgres").exists()]
    if versions:
        return max(versions, key=lambda folder: float(folder.parent.name))
    program = shutil.which("postgres")
    return Path(program).resolve().parent if program else None


def start_postgres(programs: Path, root: Path, *, password: str, log_path: Path) -> tuple[Service, str]:
    """Start Postgres on loopback, on a free port.

    Args:
        programs: Folder of Postgres's programs.
        root: Folder of the database, which the first start makes.
        password: Password of the database.
        log_path: Log of the database.

    Returns:
        The service, and the URL of its database for the Prefect server.

    Raises:
        ProcessError: The database cannot be made or started.
    """
    if not (root / "PG_VERSION").exists():
        _make_database(programs, root, password=password)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The Prefect server needs read committed: a stricter level blocks the runs of a deployment with a limit.
    options = {
        "listen_addresses": "127.0.0.1",
        "unix_socket_directories": "",
        "default_transaction_isolation": "read committed",
    }
    words = [str(programs / "postgres"), "-D", str(root), "-p", str(port)]
    words += [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
    service = Service("database", words, environment=os.environ, log_path=log_path, stop_signal=signal.SIGINT)
    ready = [str(programs / "pg_isready"), "--quiet", "--host=127.0.0.1", f"--port={port}"]
    try:
        service.wait_until(lambda: subprocess.run(ready).returncode == 0, timeout_s=_START_S)
    except BaseException:
        service.stop()
        raise
    return service, f"postgresql+asyncpg://{_USER}:{password}@127.0.0.1:{port}/postgres"


def _make_database(programs: Path, root: Path, *, password: str) -> None:
    """Make the database with one user and a password, in a folder that only this user can read."""
    words = ["--auth=scram-sha-256", f"--username={_USER}", "--encoding=UTF8", "--locale=C"]
    process = subprocess.run(
        [str(programs / "initdb"), *words, "--pwfile=/dev/stdin", f"--pgdata={root}"],
        input=f"{password}\n",
        capture_output=True,
        text=True,
    )
    if process.returncode:
        raise ProcessError(
            f"Postgres cannot make a database in {root}: {process.stderr.strip().splitlines()[-1]}",
            hint="Choose --database sqlite.",
        )
