"""promote: move a registered version to a stage."""

from __future__ import annotations

import os
from getpass import getuser
from typing import Annotated

import typer

from compileflow.cli.common import AsJson, ModelName, VersionRef, one_line_errors
from compileflow.cli.output import say, say_json


@one_line_errors
def promote(
    name: ModelName,
    version: VersionRef,
    stage: Annotated[str, typer.Option(help="staging, production, archived or none.")],
    force: Annotated[bool, typer.Option(help="Promote a version that did not pass. Needs --reason.")] = False,
    reason: Annotated[
        str, typer.Option(help="Reason for the promotion; the registry keeps it with the version.")
    ] = "",
    registry: Annotated[
        list[str] | None, typer.Option(help="URI of a registry. Repeatable. Default: all configured registries.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Move a version to a stage, in every registry that has its artifact. VERSION is looked up in the first one.

    Only a version with the verdict pass, whose artifact also passed its last validation, may enter staging or
    production, unless you give --force and --reason.
    """
    from compileflow.admin.promote import promote_version
    from compileflow.registries.references import parse_ref
    from compileflow.settings import get_settings

    settings = get_settings()
    versions = promote_version(
        name,
        parse_ref(version),
        stage,
        registry_uris=settings.resolved_registry_uris(registry or ()),
        settings=settings,
        who=_user_name(),
        reason=reason,
        force=force,
    )
    if as_json:
        values = {uri: promoted.model_dump(mode="json") for uri, promoted in versions.items()}
        say_json(values)
        return
    for uri, promoted in versions.items():
        say(f"{promoted.name} version {promoted.version} is now {promoted.stage} in {uri}")


def _user_name() -> str:
    """Return the user's name, or the numeric id of a user without a name, as in a container."""
    try:
        return getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"
