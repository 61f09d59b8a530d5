"""Keep a folder with the promoted version of a model: python examples/pull_promoted.py NAME FOLDER.

The program pulls the version when it starts, and again whenever the Prefect server of PREFECT_API_URL says that a
version was promoted. FOLDER/current leads to the newest version. While the server or the registry does not answer,
the program tries again. Any other error ends it in one line; let a supervisor start it again.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from httpx import URL, HTTPError, InvalidURL
from prefect.events.clients import get_events_subscriber
from prefect.events.filters import EventFilter, EventNameFilter
from prefect.settings import PREFECT_API_URL
from websockets.exceptions import WebSocketException

from compileflow._process.folders import os_errors
from compileflow.admin.collect import check_registry_exists
from compileflow.admin.pull import pull_version
from compileflow.catalog import open_registry
from compileflow.cli.common import exit_code
from compileflow.errors import (
    CompileflowError,
    IntegrityError,
    ProcessError,
    RegistryError,
    SpecError,
    first_line,
    without_secrets,
)
from compileflow.settings import get_settings

PROMOTED = EventFilter(event=EventNameFilter(name=["compileflow.model-version.promoted"]))
PAUSE_S = 10


def main() -> int:
    """Follow the promotions of the model that the arguments name."""
    parser = argparse.ArgumentParser(description="Keep a folder with the promoted version of a model.")
    parser.add_argument("name", help="name of the model in the registry")
    parser.add_argument("folder", type=Path, help="folder of the versions; FOLDER/current leads to the newest")
    parser.add_argument("--stage", choices=("production", "staging"), default="production")
    parser.add_argument("--registry", help="URI of the registry; default: the configured one")
    parser.add_argument(
        "--then", metavar="COMMAND", type=command, help="command to run after a new version was pulled"
    )
    options = parser.parse_args()
    try:
        url = without_secrets(PREFECT_API_URL.value() or "")
        if not is_url(url):
            raise SpecError(
                f"PREFECT_API_URL is {url or 'not set'}.",
                hint="Set it to the API of the Prefect server, for example http://127.0.0.1:4200/api.",
            )
        with os_errors(options.folder, "make"):
            options.folder.mkdir(parents=True, exist_ok=True)
        asyncio.run(follow(options, url))
    except CompileflowError as error:
        sys.stderr.write(f"error: {error}\n")
        return exit_code(error)
    except KeyboardInterrupt:
        return 130
    raise AssertionError("unreachable")


def is_url(text: str) -> bool:
    """Return whether a text is a URL of HTTP."""
    try:
        return URL(text).scheme in ("http", "https")
    except InvalidURL:
        return False


def command(text: str) -> list[str]:
    """Split a command into words, and check that its program exists."""
    words = shlex.split(text)
    if not words or shutil.which(words[0]) is None:
        raise argparse.ArgumentTypeError(f"{text!r} does not start with a program that this user can run")
    return words


async def follow(options: argparse.Namespace, url: str) -> None:
    """Pull now, and after each promotion of the model; after a lost connection, start again.

    Raises:
        CompileflowError: The server refuses the login, or another try cannot help.
    """
    while True:
        try:
            await follow_connection(options)
        except CompileflowError as error:
            if not error.retryable:
                raise
            reason = str(error)
        except Exception as error:
            # The server's API and its events refuse a login in two ways; the second has no class of its own.
            if "401 Unauthorized" in str(error) or "Unable to authenticate" in str(error):
                raise ProcessError(
                    f"The Prefect server at {url} refuses the login.",
                    hint="Set PREFECT_API_AUTH_STRING to the user and the password, for example admin:PASSWORD.",
                ) from error
            # The other paths of a Prefect server refuse a connection for events.
            if "HTTP 403" in str(error) or "HTTP 404" in str(error):
                raise ProcessError(
                    f"{url} is not the API of a Prefect server.", hint="PREFECT_API_URL usually ends in /api."
                ) from error
            if not isinstance(error, OSError | WebSocketException | HTTPError):
                raise
            reason = f"The Prefect server at {url} does not answer: {first_line(error)}."
        report(f"{reason} Trying again in {PAUSE_S} seconds.")
        await asyncio.sleep(PAUSE_S)


async def follow_connection(options: argparse.Namespace) -> None:
    """Pull now, and after each promotion, until the connection to the server is lost."""
    subscriber = get_events_subscriber(filter=PROMOTED, reconnection_attempts=0, reconnect_on_clean_close=True)
    async with subscriber as promotions:
        # What is promoted from now on arrives as an event.
        await asyncio.to_thread(update, options)
        async for event in promotions:
            if event.resource.get("compileflow.model") == options.name:
                await asyncio.to_thread(update, options)


def update(options: argparse.Namespace) -> None:
    """Make FOLDER/current lead to the version that is in the stage now, and run the command.

    Raises:
        CompileflowError: The version cannot be pulled, or the command failed; the next start runs it again.
    """
    settings = get_settings()
    uri = settings.resolved_registry_uri(options.registry)
    check_registry_exists(uri, settings)
    try:
        version = open_registry(uri, settings).get(options.name, options.stage)
    except RegistryError as error:
        if error.retryable:
            raise
        # The first version may come later.
        report(str(error))
        return
    folder = options.folder / f"version-{version.version}-{version.artifact_digest[:12]}"
    current, pending = options.folder / "current", options.folder / "command-pending"
    with os_errors(options.folder, "write to"):
        if not current.exists() or current.resolve() != folder.resolve():
            if not folder.exists():
                with tempfile.TemporaryDirectory(dir=options.folder) as incomplete:
                    reference = f"{options.name}@{version.version}"
                    pulled = pull_version(
                        reference, Path(incomplete, "pulled"), registry_uri=uri, settings=settings
                    )
                    if pulled.version.artifact_digest != version.artifact_digest:
                        raise IntegrityError(
                            f"{reference} got another artifact while it was being pulled.",
                            hint="Find out who changed the registry.",
                        )
                    pulled.folder.rename(folder)
            if options.then:
                pending.touch()
            link = options.folder / "next"
            link.unlink(missing_ok=True)
            link.symlink_to(folder.name)
            # A service that starts now finds the old version or the new one.
            link.replace(current)
            report(f"{options.name} version {version.version} is in {current}")
        if options.then and pending.exists():
            run_command(options.then)
            pending.unlink()


def run_command(words: list[str]) -> None:
    """Run the command.

    Raises:
        ProcessError: It cannot be started, or it failed.
    """
    with os_errors(Path(words[0]), "run", kind=ProcessError):
        code = subprocess.run(words).returncode
    if code:
        raise ProcessError(
            f"The command {shlex.join(words)} ended with exit code {code}.",
            hint="The next start of this program runs it again.",
        )


def report(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
