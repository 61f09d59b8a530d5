"""Command line: python -m deployments.neptune_server --root DIR [--port 8765] [--project workspace/name]."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from deployments.neptune_server.errors import ApiError
from deployments.neptune_server.registry import InUseError, Registry
from deployments.neptune_server.server import Server
from deployments.neptune_server.tokens import Tokens, keep_api_token

API_KEY_VARIABLE = "COMPILEFLOW_NEPTUNE_API_KEY"


def main(words: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; return the exit status: 0, or 2 when it could not start."""
    options = _parser().parse_args(words)
    logging.basicConfig(
        level=logging.DEBUG if options.verbose else logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
    )
    try:
        return _serve(options)
    except (InUseError, ApiError, ValueError, OSError) as error:
        text = error.detail if isinstance(error, ApiError) else error
        sys.stderr.write(f"neptune_server: {text}\n")
        return 2


def _serve(options: argparse.Namespace) -> int:
    # Whatever is written here is for this user: the database holds what sessions are signed with.
    os.umask(0o077)
    registry = Registry(options.root.expanduser().absolute())
    swept = registry.sweep()
    for project in options.project:
        registry.ensure_project(project)
    try:
        server = Server((options.host, options.port), registry, create_projects=options.create_projects)
    except OSError as error:
        raise ValueError(
            f"cannot listen at {options.host}:{options.port}: {error}. Choose another --port."
        ) from error
    url = (options.url or f"http://{options.host}:{server.server_port}").rstrip("/")
    key, made = keep_api_token(registry.token_path, url, api_key=_api_key(options.api_key_file))
    server.tokens = Tokens(key, secret=registry.secret())
    for number in (signal.SIGTERM, signal.SIGINT):
        # shutdown() waits for the loop that this thread runs.
        signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
    _say(f"Neptune-compatible registry at {url}, kept in {registry.root}.")
    if made:
        _say(f"NEPTUNE_API_TOKEN={registry.token_path.read_text('ascii').strip()}")
    else:
        _say(f"NEPTUNE_API_TOKEN is in {registry.token_path}.")
    if swept:
        _say(f"Deleted {swept} files that nothing refers to.")
    server.serve_forever(poll_interval=0.1)
    # First the listening socket: who comes now is to be refused at once, not to wait for nothing.
    server.server_close()
    server.drain()
    registry.close()
    return 0


def _api_key(path: Path | None) -> str | None:
    if path is None:
        return os.environ.get(API_KEY_VARIABLE) or None
    key = path.expanduser().read_text("utf-8").strip()
    if not key:
        raise ValueError(f"{path} is empty; put the API key into it.")
    return key


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m deployments.neptune_server", description=__doc__)
    parser.add_argument(
        "--root", type=Path, required=True, help="folder for all that is kept; one server at a time"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8765, help="0: any that is free (default: %(default)s)")
    parser.add_argument(
        "--url", help="address by which clients reach it, when that differs: https://… of the proxy in front of it"
    )
    parser.add_argument(
        "--project", action="append", default=[], metavar="WORKSPACE/NAME", help="make this project; repeatable"
    )
    parser.add_argument("--create-projects", action="store_true", help="make every project that a client asks for")
    parser.add_argument(
        "--api-key-file",
        type=Path,
        help=f"file with an API key of your own; else {API_KEY_VARIABLE}, else the one made at the first start",
    )
    parser.add_argument("--verbose", action="store_true", help="log every request: method, path, status, time")
    return parser


if __name__ == "__main__":
    sys.exit(main())
