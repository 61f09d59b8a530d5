"""versions, promote, lineage, pull: what a registry knows, and the changes of a version's stage."""

from __future__ import annotations

import json
import os
from getpass import getuser
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from compileflow.cli.common import AsJson, RegistryUri, one_line_errors

if TYPE_CHECKING:
    from rich.tree import Tree

    from compileflow.admin.lineage import Lineage

_TREE_WIDTH = 240

Name = Annotated[str, typer.Argument(help="A model's name.")]


@one_line_errors
def versions(
    name: Annotated[str | None, typer.Argument(help="A model's name. Default: all.")] = None,
    registry: RegistryUri = None,
    as_json: AsJson = False,
) -> None:
    """List registered versions, newest first."""
    from compileflow.catalog import open_registry
    from compileflow.settings import get_settings

    found = open_registry(get_settings().resolved_registry_uri(registry)).versions(name)
    if as_json:
        typer.echo(json.dumps([version.model_dump(mode="json") for version in found], indent=1))
        return
    names = ("version", "stage", "verdict", "latency ratio", "size", "created")
    table = Table(
        Column("name", overflow="fold"), Column("target", no_wrap=True), *names, Column("digest", no_wrap=True)
    )
    for version in found:
        ratio = version.figures.get("latency_ratio")
        table.add_row(
            version.name,
            version.target,
            str(version.version),
            "" if version.stage == "none" else version.stage,
            version.verdict,
            f"{ratio:.2f}" if ratio is not None else "",
            f"{version.figures.get('size_bytes', 0) / 1e6:.1f} MB",
            version.created_at[:10],
            version.artifact_digest[:12],
        )
    Console().print(table)


@one_line_errors
def promote(
    name: Name,
    version: Annotated[int, typer.Argument(help="Its number, in the first registry.")],
    stage: Annotated[str, typer.Option(help="staging, production, archived or none.")],
    force: Annotated[bool, typer.Option(help="Promote it although its verdict is not pass.")] = False,
    reason: Annotated[str, typer.Option(help="Why; kept with the version.")] = "",
    registry: Annotated[
        list[str] | None, typer.Option(help="Registry's URI. Repeat. Default: all that are configured.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Move a version to a stage, in every registry that has its artifact; only pass may serve."""
    from compileflow.admin.promote import promote_version
    from compileflow.settings import get_settings

    settings = get_settings()
    done = promote_version(
        name,
        version,
        stage,
        registry_uris=settings.resolved_registry_uris(registry or ()),
        settings=settings,
        who=_who(),
        reason=reason,
        force=force,
    )
    if as_json:
        typer.echo(json.dumps({uri: each.model_dump(mode="json") for uri, each in done.items()}, indent=1))
        return
    for uri, each in done.items():
        typer.echo(f"{each.name} version {each.version} is now {each.stage} in {uri}")


@one_line_errors
def lineage(
    name: Name,
    version: Annotated[str, typer.Argument(help="Its number, or the stage it is in.")],
    registry: RegistryUri = None,
    as_json: AsJson = False,
) -> None:
    """Show what a version was made of, what proves it and where it went, with digests."""
    from compileflow.admin.lineage import lineage_of
    from compileflow.catalog import open_registry
    from compileflow.settings import get_settings

    opened = open_registry(get_settings().resolved_registry_uri(registry))
    found = lineage_of(opened, name, int(version) if version.isdecimal() else version)
    if as_json:
        typer.echo(json.dumps(found.model_dump(mode="json"), indent=1))
    else:
        # Wide enough for a digest in any branch; a terminal wraps it itself.
        Console(width=_TREE_WIDTH, soft_wrap=True).print(_tree(found))


@one_line_errors
def pull(
    reference: Annotated[str, typer.Argument(help="NAME, NAME@STAGE or NAME@NUMBER; without, the newest.")],
    folder: Annotated[str, typer.Argument(help="Folder to write; empty or absent.")],
    registry: RegistryUri = None,
    as_json: AsJson = False,
) -> None:
    """Fetch a registered version's artifact into a folder, every byte checked."""
    from compileflow._process.folders import os_errors
    from compileflow.artifact.attestations.envelopes import write_bundle
    from compileflow.artifact.attestations.verification import attestations_of
    from compileflow.artifact.open import copy_artifact, open_artifact
    from compileflow.catalog import parse_reference, resolve_reference
    from compileflow.settings import get_settings

    settings = get_settings()
    # The option counts for registry:NAME, too.
    reference = reference.removeprefix("registry:")
    text = reference if parse_reference(reference) else f"{settings.resolved_registry_uri(registry)}#{reference}"
    version = resolve_reference(text, settings)
    artifact = open_artifact(version.artifact_uri, digest=version.artifact_digest, settings=settings)
    out = copy_artifact(artifact, folder)
    # What was fetched before its validation came without the verdict.
    said = attestations_of(version.artifact_uri, settings=settings)
    with os_errors(out, "write to"):
        write_bundle(out, said)
    if as_json:
        typer.echo(json.dumps({"folder": str(out), "version": version.model_dump(mode="json")}, indent=1))
    else:
        typer.echo(f"{version.name} version {version.version}, digest {artifact.digest}, is in {out}")


def _who() -> str:
    """Return the user's name, or the number of one that has none, as in a container."""
    try:
        return getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def _tree(found: Lineage) -> Tree:
    from rich.markup import escape
    from rich.tree import Tree

    version = found.version
    stage = "" if version.stage == "none" else f", {version.stage}"
    tree = Tree(escape(f"source {version.source_uri} at {version.source_revision}"))
    tree.add(f"digest {version.source_digest}")
    branch = tree.add(escape(f"{version.name} version {version.version} for {version.target}{stage}"))
    branch.add(escape(f"artifact {version.artifact_uri}")).add(f"digest {version.artifact_digest}")
    report = branch.add(escape(f"report {version.report_uri}, verdict {version.verdict}"))
    report.add(f"digest {version.report_digest}")
    for change in found.promotions:
        why = f": {change.reason}" if change.reason else ""
        branch.add(escape(f"{change.at} {change.who} made it {change.stage}{why}"))
    for each in found.siblings:
        tree.add(escape(f"{each.name} version {each.version} for {each.target}, digest {each.artifact_digest}"))
    return tree
