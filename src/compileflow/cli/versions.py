"""versions: list registered versions."""

from __future__ import annotations

from typing import Annotated

import typer

from compileflow.cli.common import AsJson, RegistryUri, one_line_errors
from compileflow.cli.output import say, say_json
from compileflow.cli.tables import print_table

_HEADER = ("name", "target", "version", "stage", "verdict", "latency ratio", "size", "created", "digest")


@one_line_errors
def versions(
    name: Annotated[str | None, typer.Argument(help="Name of a registered model. Default: all models.")] = None,
    registry: RegistryUri = None,
    limit: Annotated[int, typer.Option(min=0, help="Number of versions to list; 0 lists all.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List registered versions, newest first."""
    from compileflow.admin.collect import check_registry_exists
    from compileflow.catalog import open_registry
    from compileflow.contracts import LATENCY_ON_BUSY_MACHINE
    from compileflow.settings import get_settings
    from compileflow.validation.report import fraction

    settings = get_settings()
    registry_uri = settings.resolved_registry_uri(registry)
    check_registry_exists(registry_uri, settings)
    # One more tells whether there are more.
    found = open_registry(registry_uri).versions(name, limit=limit + 1 if limit else None)
    rows = found[:limit] if limit else found
    if len(found) > len(rows):
        say(f"Listing the {limit} newest versions; --limit 0 lists all.", err=True)
    if as_json:
        say_json([version.model_dump(mode="json") for version in rows])
        return
    table = []
    for version in rows:
        ratio = version.figures.get("latency_ratio")
        without_ratio = "busy machine" if LATENCY_ON_BUSY_MACHINE in version.figures else ""
        table.append(
            (
                version.name,
                version.target,
                str(version.version),
                "" if version.stage == "none" else version.stage,
                version.verdict,
                fraction(ratio) if ratio is not None else without_ratio,
                f"{version.figures.get('size_bytes', 0) / 1e6:.1f} MB",
                version.created_at[:10],
                version.artifact_digest[:12],
            )
        )
    print_table(_HEADER, table, optional=("digest", "created", "size", "latency ratio"))
