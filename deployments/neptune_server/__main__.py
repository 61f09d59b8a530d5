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
from deployments.neptune_server.tokens import Tokens, write_api_token

API_KEY_VARIABLE = "COMPILEFLOW_NEPTUNE_API_KEY"


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; return the exit status: 0, or 2 if the server cannot start."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.DEBUG if options.verbose else logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
    )
    try:
        return _serve(options)
    except (InUseError, ApiError, ValueError, OSError) as error:
        message = error.detail if isinstance(error, ApiError) else error
        sys.stderr.write(f"neptune_server: {message}\n")
        return 2


def _serve(options: argparse.Namespace) -> int:
    # Only this user may read the data: the database contains the key that signs sessions.
    os.umask(0o077)
    registry = Registry(options.root.expanduser().absolute())
    deleted_files = registry.sweep()
    for project in options.project:
        registry.ensure_project(project)
    try:
        server = Server((options.host, options.port), registry)
    except OSError as error:
        raise ValueError(
            f"Cannot listen on {options.host}:{options.port}: {error}. Choose another --port."
        ) from error
    url = (options.url or f"http://{options.host}:{server.server_port}").rstrip("/")
    key, is_new = write_api_token(registry.token_path, url, api_key=_api_key(options.api_key_file))
    server.tokens = Tokens(key, secret=registry.secret())
    for number in (signal.SIGTERM, signal.SIGINT):
        # shutdown() waits for serve_forever(), which this thread runs.
        signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
    _print(f"Neptune-compatible registry at {url}, data in {registry.root}.")
    if is_new:
        _print(f"NEPTUNE_API_TOKEN={registry.token_path.read_text('ascii').strip()}")
    else:
        _print(f"NEPTUNE_API_TOKEN is in {registry.token_path}.")
    if deleted_files:
        _print(f"Deleted {deleted_files} files that no field uses.")
    server.serve_forever(poll_interval=0.1)
    # Close the listening socket first, so that a new client is refused at once instead of waiting.
    server.server_close()
    server.drain()
    registry.close()
    return 0


def _api_key(path: Path | None) -> str | None:
    if path is None:
        return os.environ.get(API_KEY_VARIABLE) or None
    key = path.expanduser().read_text("utf-8").strip()
    if not key:
        raise ValueError(f"The API key file {path} is empty. Write the API key to it.")
    return key


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _path(text: str) -> Path:
    """Return a path. Empty text, for example from a variable of a script, would mean the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got ''")
    return Path(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m deployments.neptune_server", description="Serve a model registry for the neptune 1.x client."
    )
    parser.add_argument(
        "--root", type=_path, required=True, help="folder for all data; only one server can use it at a time"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument(
        "--port", type=int, default=8765, help="port to listen on; 0 means any free port (default: %(default)s)"
    )
    parser.add_argument(
        "--url", help="address by which clients reach the server if a proxy is in front of it: https://..."
    )
    parser.add_argument(
        "--project",
        action="append",
        default=[],
        metavar="WORKSPACE/NAME",
        help="create this project unless it exists; repeatable",
    )
    parser.add_argument(
        "--api-key-file",
        type=_path,
        help=f"file with the API key (default: {API_KEY_VARIABLE}, the key in the token file, or a new key)",
    )
    parser.add_argument(
        "--verbose", action="store_true", help="log method, path, status and time of every request"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
