"""lineage: show where a version came from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from compileflow.cli.common import AsJson, ModelName, RegistryUri, VersionRef, one_line_errors
from compileflow.cli.output import plain, say_json

if TYPE_CHECKING:
    from rich.tree import Tree

    from compileflow.admin.lineage import Lineage

_TREE_WIDTH = 240


@one_line_errors
def lineage(
    name: ModelName,
    version: VersionRef,
    registry: RegistryUri = None,
    as_json: AsJson = False,
) -> None:
    """Show where a version came from: its source model, report and promotions, and versions of the same model."""
    from compileflow.admin.lineage import lineage_of
    from compileflow.catalog import open_registry
    from compileflow.registries.references import parse_ref
    from compileflow.settings import get_settings

    model_registry = open_registry(get_settings().resolved_registry_uri(registry))
    history = lineage_of(model_registry, name, parse_ref(version))
    if as_json:
        say_json(history.model_dump(mode="json"))
    else:
        # Wide enough for a digest in any branch; a terminal wraps long lines itself.
        Console(width=_TREE_WIDTH, soft_wrap=True).print(_tree(history))


def _tree(history: Lineage) -> Tree:
    from rich.tree import Tree

    from compileflow.contracts import LATENCY_ON_BUSY_MACHINE

    version = history.version
    stage = "" if version.stage == "none" else f", {version.stage}"
    tree = Tree(plain(f"source {version.source_uri} at {version.source_revision}"))
    tree.add(plain(f"digest {version.source_digest}"))
    branch = tree.add(plain(f"{version.name} version {version.version} for {version.target}{stage}"))
    branch.add(plain(f"artifact {version.artifact_uri}")).add(plain(f"digest {version.artifact_digest}"))
    mark = ", latency measured on a busy machine" if LATENCY_ON_BUSY_MACHINE in version.figures else ""
    report = branch.add(plain(f"report {version.report_uri}, verdict {version.verdict}{mark}"))
    report.add(plain(f"digest {version.report_digest}"))
    last_stage: str = "none"
    for promotion in history.promotions:
        reason = f": {promotion.reason}" if promotion.reason else ""
        action = "noted" if promotion.stage == last_stage else f"made it {promotion.stage}"
        branch.add(plain(f"{promotion.at} {promotion.who} {action}{reason}"))
        last_stage = promotion.stage
    for sibling in history.siblings:
        line = f"{sibling.name} version {sibling.version} for {sibling.target}, digest {sibling.artifact_digest}"
        tree.add(plain(line))
    return tree
