"""Postgres for the Prefect server: the programs of Debian's package, and the check of any Postgres database."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from compileflow.errors import ProcessError, without_secrets
from deployments.services import Service

DATABASE_URL = "PREFECT_SERVER_DATABASE_CONNECTION_URL"
_ROOT = Path(__file__).parents[1]
_DEBIAN = Path("/usr/lib/postgresql")
_USER = "prefect"
_START_S = 60.0
_LEVEL = "read committed"


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
    options = {
        "listen_addresses": "127.0.0.1",
        "unix_socket_directories": "",
        "default_transaction_isolation": _LEVEL,
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
    return service, f"postgresql+asyncpg://{_USER}:{quote(password, safe='')}@127.0.0.1:{port}/postgres"


def check_isolation(environment: Mapping[str, str]) -> None:
    """Check that a database's transactions are read committed by default, as the Prefect server needs.

    At a stricter level, runs of a deployment with a concurrency limit can wait forever. The command line of
    Postgres, the database and the user can each set the level; the last one wins.

    Args:
        environment: Environment of the Prefect server, with DATABASE_URL.

    Raises:
        ProcessError: The level is stricter, or the database does not answer.
    """
    name = without_secrets(environment[DATABASE_URL])
    process = subprocess.run(
        [sys.executable, "-m", "deployments.postgres"], cwd=_ROOT, env=environment, capture_output=True, text=True
    )
    if process.returncode:
        reason = without_secrets(process.stderr.strip().rpartition("\n")[2])
        raise ProcessError(
            f"The database {name} cannot be used: {reason}.", hint=f"Start it, or correct {DATABASE_URL}."
        )
    level = process.stdout.strip()
    if level not in (_LEVEL, "read uncommitted"):
        raise ProcessError(
            f"The Prefect server needs default_transaction_isolation = {_LEVEL!r}, but {name} has {level!r}.",
            hint="Change it where it is set: in postgresql.conf, in the URL, or by ALTER DATABASE or ALTER ROLE.",
        )


async def _default_isolation() -> str:
    # Prefect's own connection understands all that the URL may hold.
    from prefect.server.database.configurations import AsyncPostgresConfiguration
    from sqlalchemy import text

    engine = await AsyncPostgresConfiguration(os.environ[DATABASE_URL]).engine()
    async with engine.connect() as connection:
        return str(await connection.scalar(text("SHOW default_transaction_isolation")))


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


if __name__ == "__main__":
    print(asyncio.run(_default_isolation()))  # noqa: T201 - check_isolation reads it
