"""Command line: python -m deployments.serve [--port 4200]: server, deployments and worker on loopback."""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import typer

from compileflow._process.folders import file_lock, file_written_whole, os_errors
from compileflow.catalog import open_registry, open_store
from compileflow.errors import CompileflowError, ProcessError
from compileflow.settings import get_settings
from deployments.deploy import TAG
from deployments.postgres import DATABASE_URL, check_isolation, postgres_programs, start_postgres
from deployments.services import Service
from flows.environment import SERVER_SETTINGS, check_room

POOL = "compileflow"
WORKER = "serve"
_ROOT = Path(__file__).parents[1]
_PREFECT = (sys.executable, "-m", "prefect")
_USER = "admin"
_SERVER_START_S = 180.0
_WORKER_START_S = 60.0
# A worker that ends sooner would end again.
_SHORTEST_LIFE_S = 15.0
_LOOK_S = 60
_LONGEST_PENDING = timedelta(minutes=5)
_SETTINGS = SERVER_SETTINGS | {
    "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    # The newer UI asks a host for analytics from the browser.
    "PREFECT_SERVER_UI_V2_ENABLED": "false",
    # In memory, a restart of the server would end running compiles and keep their slots taken.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    "PREFECT_WORKER_QUERY_SECONDS": "2",
    # The automation in deployments/automations.yaml waits for three heartbeats.
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "compileflow",
    "PREFECT_CLI_PROMPT": "false",
}


@dataclass(frozen=True)
class Access:
    """Address of the server, and the password that its basic authentication asks for.

    Attributes:
        url: Address of the UI.
        password: Password of the user admin.
        is_new: Whether this start generated the password.
    """

    url: str
    password: str
    is_new: bool

    @property
    def client_environment(self) -> dict[str, str]:
        """Variables that a client of the server needs."""
        return {
            "PREFECT_API_URL": f"{self.url}/api",
            "PREFECT_API_AUTH_STRING": f"{_USER}:{self.password}",
        }

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Send a request to the API; return the decoded answer, or None without a good one."""
        login = base64.b64encode(f"{_USER}:{self.password}".encode()).decode()
        request = urllib.request.Request(  # noqa: S310 - the server of this process
            f"{self.url}/api{path}",
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json", "Authorization": f"Basic {login}"},
            method=method,
        )
        # A proxy of the environment does not reach this machine's loopback.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=10) as answer:
                return json.loads(answer.read())
        except (OSError, ValueError):
            return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C or SIGTERM; return the exit status: 0, or 2 if a part cannot start or ends."""
    try:
        options = _parser().parse_args(arguments)
        settings = get_settings()
        # Every run would find a wrong URI again.
        open_store(settings.resolved_store_uri(), settings)
        for uri in settings.resolved_registry_uris():
            open_registry(uri, settings)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _interrupt)
        # Only this user may read the database, the logs and the password.
        os.umask(0o077)
        home = settings.home_dir / "serve"
        with os_errors(home, "write to"):
            for name in ("logs", "tmp"):
                (home / name).mkdir(parents=True, exist_ok=True)
        check_room(home)
        with file_lock(home / "lock", on_wait=lambda: _refuse_second_start(home)):
            _serve(home, options)
    except KeyboardInterrupt:
        typer.echo("Stopped.")
        return 0
    except CompileflowError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    raise AssertionError("unreachable")


def _serve(home: Path, options: argparse.Namespace) -> None:
    _check_port(options.port)
    access = _access(home, options.port)
    folders = {
        "PREFECT_HOME": str(home / "prefect"),
        # Workers of all users of a machine share one folder in the usual one, which belongs to the first of them.
        "TMPDIR": str(home / "tmp"),
    }
    environment = {**_SETTINGS, **os.environ, **access.client_environment, **folders}
    typer.echo("Starting the Prefect server. The first start takes a minute.")
    services: dict[str, Service] = {}
    try:
        database_url = _start_database(home, access, options.database, environment, services)
        server_environment = {
            **environment,
            **database_url,
            "PREFECT_SERVER_API_AUTH_STRING": environment["PREFECT_API_AUTH_STRING"],
        }
        is_postgres = database_url.get(DATABASE_URL, "").startswith("postgresql")
        if is_postgres:
            check_isolation(server_environment)

        def start_server() -> None:
            words = [*_PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(options.port)]
            log_path = home / "logs" / "server.log"
            server = Service("server", words, environment=server_environment, log_path=log_path)
            services["server"] = server
            server.wait_until(lambda: access.call("GET", "/admin/version") is not None, timeout_s=_SERVER_START_S)

        def start_worker() -> None:
            words = [*_PREFECT, "worker", "start", "--pool", POOL, "--name", WORKER]
            log_path = home / "logs" / "worker.log"
            worker = Service("worker", words, environment=environment, log_path=log_path, runs_flows=True)
            services["worker"] = worker
            worker.wait_until(lambda: _has_worker(access), timeout_s=_WORKER_START_S)

        start_server()
        deploy = subprocess.run([sys.executable, "-m", "deployments.deploy"], cwd=_ROOT, env=environment)
        if deploy.returncode:
            raise ProcessError("The deployments cannot be applied.", hint="Correct what is printed above.")
        start_worker()
        database = "Postgres" if is_postgres else "SQLite"
        typer.echo(f"Prefect: {access.url}, on loopback only, with {database}. Logs: {home / 'logs'}")
        if access.is_new:
            typer.echo(f"Log in with  {_USER}:{access.password}  (printed only this once)")
        path = home / "client.env"
        typer.echo(f"The password is in {path}. For commands in another terminal: . {path}")
        typer.echo("Ready. Ctrl-C stops everything.")
        for second in count(1):
            time.sleep(1)
            if second % _LOOK_S == 0:
                crash_lost_runs(access)
            for service in services.values():
                if service.age_s < _SHORTEST_LIFE_S or service.name == "database":
                    service.check_running()
            for name, start in (("server", start_server), ("worker", start_worker)):
                if services[name].has_ended():
                    typer.echo(f"The {name} ended. Another one starts.")
                    start()
    finally:
        # A service that took the place of another one also took its place in this order.
        for service in reversed(services.values()):
            service.stop()


def crash_lost_runs(access: Access) -> None:
    """Crash the runs that a worker took long ago and never started.

    An automation does so within two minutes, unless a busy SQLite has lost the event that it waits for.
    """
    states = {"state": {"type": {"any_": ["PENDING"]}}, "tags": {"all_": [TAG]}}
    for run in access.call("POST", "/flow_runs/filter", {"flow_runs": states}) or ():
        if datetime.now(UTC) - datetime.fromisoformat(run["state"]["timestamp"]) > _LONGEST_PENDING:
            message = "A worker took the run and never started it. The worker may have died."
            state = {"type": "CRASHED", "name": "Crashed", "message": message}
            access.call("POST", f"/flow_runs/{run['id']}/set_state", {"state": state, "force": True})


def _start_database(
    home: Path,
    access: Access,
    choice: str,
    environment: dict[str, str],
    services: dict[str, Service],
) -> dict[str, str]:
    """Start Postgres, unless another database was chosen; return the variable with the URL, empty for SQLite.

    The URL of a database of the user's own is taken out of the environment, where clients do not need it.
    """
    urls = [environment.pop(name, "") for name in (DATABASE_URL, "PREFECT_API_DATABASE_CONNECTION_URL")]
    if choice == "auto" and any(urls):
        return {DATABASE_URL: urls[0] or urls[1]}
    programs = postgres_programs() if choice != "sqlite" else None
    if programs is not None:
        password = _database_password(home, access.password)
        services["database"], url = start_postgres(
            programs, home / "postgres", password=password, log_path=home / "logs" / "postgres.log"
        )
        return {DATABASE_URL: url}
    if choice == "postgres":
        raise ProcessError(
            "Postgres was requested, but this user cannot run it: its programs are missing, or the user is root.",
            hint="Install the package postgresql and use another user than root, or choose --database sqlite.",
        )
    return {}


def _database_password(home: Path, server_password: str) -> str:
    """Return the password of the database: that of the server at the first start, even if it changes later."""
    path = home / "database-password"
    with os_errors(path, "write"):
        if not path.exists():
            with file_written_whole(path) as partial:
                partial.write_text(server_password, "utf-8")
        return path.read_text("utf-8")


def _has_worker(access: Access) -> bool:
    workers = access.call("POST", f"/work_pools/{POOL}/workers/filter", {}) or []
    return any(worker["name"] == WORKER and worker["status"] == "ONLINE" for worker in workers)


def _access(home: Path, port: int) -> Access:
    """Return the address, with the password of an earlier start or a new one, and write both for clients."""
    path = home / "client.env"
    is_new = not path.exists()
    password = secrets.token_urlsafe(12) if is_new else _password_in(path)
    access = Access(f"http://127.0.0.1:{port}", password, is_new=is_new)
    lines = [f"export {name}={shlex.quote(value)}\n" for name, value in access.client_environment.items()]
    with os_errors(path, "write"), file_written_whole(path) as partial:
        partial.touch(mode=0o600)
        partial.write_text("".join(lines), "utf-8")
    return access


def _password_in(path: Path) -> str:
    """Read the password, as a shell that sources the file does.

    Raises:
        ProcessError: The file does not hold the lines that `_access` writes.
    """
    try:
        words = [word for word in shlex.split(path.read_text("utf-8")) if word != "export"]
        values = dict(word.split("=", 1) for word in words)
        user, _, password = values["PREFECT_API_AUTH_STRING"].partition(":")
        if user != _USER or not password:
            raise ValueError(f"expected {_USER}:PASSWORD")
    except (OSError, ValueError, KeyError) as error:
        raise ProcessError(
            f"{path} cannot be read: expected a line export PREFECT_API_AUTH_STRING={_USER}:PASSWORD.",
            hint="Correct it; or delete it, and the next start makes a new password.",
        ) from error
    return password


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        # As the server does: a port that was left a moment ago is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ProcessError(
                f"Port {port} of 127.0.0.1 cannot be used: {error.strerror}.",
                hint=f"Choose another one: make serve PORT={port + 100 if port < 65000 else port - 100}",
            ) from error


def _refuse_second_start(home: Path) -> None:
    raise ProcessError(
        f"Another process serves {home} already.",
        hint="Use its server, stop it with Ctrl-C, or set COMPILEFLOW_HOME to another folder.",
    )


def _interrupt(number: int, _: object) -> None:
    # The next ones would disturb the end of the services, which takes some seconds.
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        typer.echo("Stopping. A run that is under way ends as Crashed.")
    raise KeyboardInterrupt


def _port(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= 65535):
        raise ProcessError(
            f"Expected a port from 1 to 65535, got {text!r}.", hint="For example: make serve PORT=4200"
        )
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m deployments.serve",
        description="Start a Prefect server with a password, the deployments and a worker, on loopback only.",
    )
    parser.add_argument("--port", type=_port, default=4200, help="port of the server (default: %(default)s)")
    parser.add_argument(
        "--database",
        choices=("auto", "sqlite", "postgres"),
        default="auto",
        help=f"auto: the Postgres of {DATABASE_URL}; without one, Postgres if its programs are installed and the "
        "user is not root, else SQLite",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
