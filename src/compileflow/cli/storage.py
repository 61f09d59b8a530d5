"""gc, mirror: what stands in artifact stores."""

from __future__ import annotations

from typing import Annotated

import typer

from compileflow.cli.common import one_line_errors


@one_line_errors
def gc(
    store: Annotated[str | None, typer.Option(help="Artifact store's URI. Default: as configured.")] = None,
    registry: Annotated[
        list[str] | None,
        typer.Option(help="Registry whose versions stay. Repeat. Default: all that are configured."),
    ] = None,
    min_age_days: Annotated[
        float, typer.Option(min=0.0, help="What was put in within these days stays, registered or not.")
    ] = 1.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Delete nothing; say what would go.")] = False,
) -> None:
    """Delete what no registered version and nothing young refers to."""
    from compileflow.admin.collect import collect_garbage
    from compileflow.settings import get_settings

    settings = get_settings()
    gone = collect_garbage(
        settings.resolved_store_uri(store),
        settings.resolved_registry_uris(registry or ()),
        settings=settings,
        min_age_s=min_age_days * 86400,
        dry_run=dry_run,
    )
    typer.echo(
        f"{'would delete' if dry_run else 'deleted'} {gone.folders} folders and {gone.blobs} blobs, "
        f"{gone.size_bytes / 1e6:.1f} MB"
    )


@one_line_errors
def mirror(
    from_store: Annotated[str, typer.Argument(help="Artifact store's URI to copy from.")],
    to_store: Annotated[str, typer.Argument(help="Artifact store's URI to copy to.")],
    digest: Annotated[list[str] | None, typer.Option(help="Only this folder. Repeat. Default: all.")] = None,
) -> None:
    """Copy an artifact store into another, or what of it is not there yet; every byte is checked."""
    from compileflow.admin.mirror import mirror_store
    from compileflow.settings import get_settings

    count = mirror_store(
        from_store,
        to_store,
        settings=get_settings(),
        digests=digest or None,
        on_progress=lambda line: typer.echo(line, err=True),
    )
    typer.echo(f"{to_store} has {count} folders of {from_store}")
