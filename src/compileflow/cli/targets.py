"""targets: list every known target and whether it works on this machine."""

from __future__ import annotations

from typing import Any

from compileflow.cli.common import AsJson, one_line_errors
from compileflow.cli.output import say, say_json
from compileflow.cli.tables import print_table


@one_line_errors
def targets(as_json: AsJson = False) -> None:
    """List the targets, and whether each can compile and run on this machine."""
    from compileflow.catalog import target_names

    rows = [_row(name) for name in target_names()]
    if as_json:
        say_json(rows)
        return
    table, notes = [], []
    for row in rows:
        lacking = row["lacking"] if row["can_run"] else {}
        precisions = [f"({name})" if name in lacking else name for name in row["precisions"]]
        precisions += [f"{name}*" for name in row["generation_precisions"] if name not in row["precisions"]]
        table.append(
            (
                str(row["target"]),
                "yes" if row["can_compile"] else "no",
                "yes" if row["can_run"] else "no",
                ", ".join(precisions),
            )
        )
        if row["reason"]:
            notes.append(f"{row['target']}: {row['reason']}. {row['hint']}")
        notes += [f"{row['target']} ({precision}): {reason}." for precision, reason in lacking.items()]
    print_table(("target", "compiles here", "runs here", "precisions"), table)
    if any("*" in cells[-1] for cells in table):
        notes.append("*: for text-generation only.")
    for note in notes:
        say(note)


def _row(name: str) -> dict[str, Any]:
    from dataclasses import asdict

    from compileflow.catalog import get_target
    from compileflow.contracts import Availability, Capabilities
    from compileflow.errors import SpecError

    try:
        target = get_target(name)
    except SpecError as error:
        # The class of a third party cannot be imported. The other targets are still listed.
        summary, capabilities = "", Capabilities((), (), (), dynamic_axes=False)
        availability = Availability(False, False, reason=error.message.rstrip("."), hint=error.hint)
    else:
        summary, capabilities, availability = target.summary, target.capabilities, target.probe()
    return {
        "target": name,
        **asdict(availability),
        "precisions": [precision.value for precision in capabilities.precisions],
        "generation_precisions": [precision.value for precision in capabilities.generation_precisions],
        "hf_tasks": [task.value for task in capabilities.hf_tasks],
        "devices": list(capabilities.devices),
        "dynamic_axes": capabilities.dynamic_axes,
        "summary": summary,
    }
