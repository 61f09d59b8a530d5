"""targets: list every known target and whether it works on this machine."""

from __future__ import annotations

import json

import typer
from rich.console import Console
from rich.table import Column, Table

from compileflow.cli.common import AsJson, one_line_errors


@one_line_errors
def targets(as_json: AsJson = False) -> None:
    """List the targets, and whether each can compile and run on this machine."""
    from dataclasses import asdict

    from compileflow.catalog import get_target, target_names

    rows = []
    for name in target_names():
        target = get_target(name)
        capabilities = target.capabilities
        rows.append(
            {
                "target": name,
                **asdict(target.probe()),
                "precisions": [precision.value for precision in capabilities.precisions],
                "hf_tasks": [task.value for task in capabilities.hf_tasks],
                "devices": list(capabilities.devices),
                "dynamic_axes": capabilities.dynamic_axes,
                "summary": target.summary,
            }
        )
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    table = Table(Column("target", no_wrap=True), "compiles here", "runs here", "precisions")
    notes = []
    for row in rows:
        lacking = row["lacking"] if row["can_run"] else {}
        table.add_row(
            str(row["target"]),
            "yes" if row["can_compile"] else "no",
            "yes" if row["can_run"] else "no",
            ", ".join(f"({name})" if name in lacking else name for name in row["precisions"]),
        )
        if row["reason"]:
            notes.append(f"{row['target']}: {row['reason']}. {row['hint']}")
        notes += [f"{row['target']} ({precision}): {reason}." for precision, reason in lacking.items()]
    Console().print(table)
    for note in notes:
        typer.echo(note)
