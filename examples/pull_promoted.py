"""Keep a folder with the promoted version of a model: python examples/pull_promoted.py NAME FOLDER.

The program pulls the version when it starts, and again whenever the Prefect server of PREFECT_API_URL says that a
version was promoted. FOLDER/current leads to the newest version. The program ends with an error if the server or
the registry does not answer any more; let a supervisor start it again.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from prefect.events.clients import get_events_subscriber
from prefect.events.filters import EventFilter, EventNameFilter

from compileflow.admin.pull import pull_version
from compileflow.catalog import open_registry
from compileflow.contracts import ModelVersion
from compileflow.errors import CompileflowError, RegistryError
from compileflow.settings import get_settings

PROMOTED = EventFilter(event=EventNameFilter(name=["compileflow.model-version.promoted"]))


def main() -> int:
    """Follow the promotions of the model that the arguments name."""
    parser = argparse.ArgumentParser(description="Keep a folder with the promoted version of a model.")
    parser.add_argument("name", help="name of the model in the registry")
    parser.add_argument("folder", type=Path, help="folder of the versions; FOLDER/current leads to the newest")
    parser.add_argument("--stage", default="production")
    parser.add_argument("--registry", help="URI of the registry; default: the configured one")
    parser.add_argument("--then", metavar="COMMAND", help="command to run after a new version was pulled")
    options = parser.parse_args()
    try:
        asyncio.run(follow(options))
    except CompileflowError as error:
        sys.stderr.write(f"error: {error}\n")
    # The server has closed the connection for good.
    return 1


async def follow(options: argparse.Namespace) -> None:
    """Pull now, and after each promotion of the model."""
    async with get_events_subscriber(filter=PROMOTED, reconnect_on_clean_close=True) as promotions:
        # What is promoted from now on arrives as an event.
        await asyncio.to_thread(update, options)
        async for event in promotions:
            if event.resource.get("compileflow.model") == options.name:
                await asyncio.to_thread(update, options)


def update(options: argparse.Namespace) -> None:
    """Make FOLDER/current lead to the version that is in the stage now."""
    settings = get_settings()
    uri = settings.resolved_registry_uri(options.registry)
    version = version_in_stage(uri, options.name, options.stage)
    if version is None:
        report(f"{options.name} has no version in {options.stage}")
        return
    folder = options.folder / f"version-{version.version}-{version.artifact_digest[:12]}"
    current = options.folder / "current"
    if current.exists() and current.resolve() == folder.resolve():
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=options.folder) as incomplete:
            reference = f"{options.name}@{version.version}"
            pulled = pull_version(reference, Path(incomplete, "pulled"), registry_uri=uri, settings=settings)
            pulled.folder.rename(folder)
    link = options.folder / "next"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    # A service that starts now finds the old version or the new one.
    link.replace(current)
    report(f"{options.name} version {version.version} is in {current}")
    if options.then:
        subprocess.run(shlex.split(options.then), check=True)


def version_in_stage(uri: str, name: str, stage: str) -> ModelVersion | None:
    """Return the version in the stage, if there is one."""
    try:
        return open_registry(uri).get(name, stage)
    except RegistryError as error:
        if error.retryable:
            raise
        return None


def report(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
