"""pull: download a registered version's artifact."""

from __future__ import annotations

from typing import Annotated

import typer

from compileflow.cli.common import AsJson, RegistryUri, one_line_errors
from compileflow.cli.output import say, say_json


@one_line_errors
def pull(
    reference: Annotated[
        str,
        typer.Argument(
            help="NAME@STAGE, NAME@NUMBER, or NAME for the newest version; also registry:NAME and "
            "REGISTRY_URI#NAME."
        ),
    ],
    folder: Annotated[str, typer.Argument(help="Folder to write to; it must be empty or absent.")],
    registry: RegistryUri = None,
    as_json: AsJson = False,
) -> None:
    """Download a registered version's artifact into a folder, and check every byte."""
    from compileflow.admin.pull import pull_version
    from compileflow.settings import get_settings

    pulled = pull_version(reference, folder, registry_uri=registry, settings=get_settings())
    version = pulled.version
    if as_json:
        values = {"folder": str(pulled.folder), "version": version.model_dump(mode="json")}
        say_json(values)
    else:
        digest = version.artifact_digest
        say(f"{version.name} version {version.version}, digest {digest}, is in {pulled.folder}")
