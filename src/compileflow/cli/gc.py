"""gc: delete folders of an artifact store that nothing needs."""

from __future__ import annotations

from typing import Annotated

import typer

from compileflow.cli.common import one_line_errors
from compileflow.cli.output import say

_SECONDS_PER_DAY = 86400
# A collection of more than this fraction of a store needs --yes.
_USUAL_SHARE = 0.5


@one_line_errors
def gc(
    store: Annotated[
        str | None, typer.Option(help="URI of the artifact store. Default: the configured store.")
    ] = None,
    registry: Annotated[
        list[str] | None,
        typer.Option(
            help="Registry whose versions keep their artifacts. Repeatable. Default: all configured registries."
        ),
    ] = None,
    min_age_days: Annotated[
        float, typer.Option(min=0.0, help="Keep everything that was stored within this many days.")
    ] = 1.0,
    keep: Annotated[list[str] | None, typer.Option(help="Digest of a further folder to keep. Repeatable.")] = None,
    lost: Annotated[
        list[str] | None,
        typer.Option(
            help="Digest of a folder that is known to be missing although a version names it. Repeatable."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Delete nothing; only report what would be deleted.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Delete even if that is more than half of the store.")
    ] = False,
) -> None:
    """Delete folders of a store that are old enough and that no registered version needs."""
    from compileflow.admin.collect import collect_garbage
    from compileflow.errors import EmptyRegistryError
    from compileflow.settings import get_settings

    settings = get_settings()
    try:
        collected = collect_garbage(
            settings.resolved_store_uri(store),
            settings.resolved_registry_uris(registry or ()),
            settings=settings,
            min_age_s=min_age_days * _SECONDS_PER_DAY,
            dry_run=dry_run,
            keep=keep or (),
            lost=lost or (),
            at_most=1.0 if yes else _USUAL_SHARE,
        )
    except EmptyRegistryError as error:
        say(f"Nothing was deleted: {error.message}")
        return
    say(
        f"{'would delete' if dry_run else 'deleted'} {collected.folders} folders and {collected.blobs} blobs, "
        f"{collected.size_bytes / 1e6:.1f} MB"
    )
