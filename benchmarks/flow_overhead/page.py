"""page: docs/reference/flow-overhead.md, and the goals that the figures are judged by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Seconds that a run adds against a running server, and that a run from the cache takes in all.
MOST_ADDED_S, MOST_CACHED_RUNNING_S, MOST_CACHED_EMBEDDED_S, MOST_HELP_S = 2.0, 2.0, 5.0, 1.0
LEAST_OF_LINEAR = 0.8
Figures = Mapping[str, Any]
Rows = list[tuple[str, ...]]

_INTRODUCTION = """\
# Overhead of flows

What Prefect adds to a run: `python -m compileflow compile`, which is the library without Prefect, beside
`python -m flows compile` against a running server and with the embedded server, which starts and ends with the
run. The model is a small random BERT, so that little of the time is its own. All kinds take turns in each round; a
figure is the median, with the quartiles. Processor time includes the embedded server and the child processes of
the steps, but not the running server. The runs are started by a command. A run of a deployment sends heartbeats as
well, and waits for up to a second at its end for the thread that sends them.

To measure it again: `python benchmarks/exp_flow_overhead.py --page docs/reference/flow-overhead.md`
"""
_TITLES = {
    "cached": "A run that finds everything in the cache",
    "cold": "A run with an empty store",
    "matrix": "A matrix on several workers",
}


def run_rows(figures: Figures) -> Rows:
    """Return the table of the runs of one part, header first."""
    rows: Rows = [("run", "wall time", "added to the library", "times the library", "processor time")]
    for kind, values in figures["kinds"].items():
        rows.append(
            (
                kind,
                _seconds(values["wall_s"]),
                _seconds(values["added_s"]) if "added_s" in values else "",
                f"{values['ratio'][1]:.2f}" if "ratio" in values else "",
                _seconds(values["processor_s"]),
            )
        )
    return rows


def matrix_rows(figures: Figures) -> Rows:
    """Return the table of the matrix, header first."""
    killed = "after its end" if figures["killed_s"] is None else f"after {figures['killed_s']:.0f} s"
    return [
        ("figure", "value"),
        ("cells that passed", f"{figures['passed']} of {figures['cells']}"),
        ("versions registered", f"{figures['versions']}, of which {figures['registered_once']} differ"),
        ("wall time", f"{figures['wall_s']:.0f} s"),
        ("a worker was killed", f"{killed}, with the run that it had started"),
        ("one cell after another", f"{figures['cell_s']:.1f} s each"),
        (f"share of linear on {figures['processors']} processors", f"{figures['share_of_linear']:.2f}"),
    ]


def goal_rows(results: Figures) -> Rows:
    """Return the goals and whether they are met, header first."""
    rows: Rows = [("goal", "measured", "met")]
    for part in ("cached", "cold"):
        if part in results:
            busy, kinds = results[part]["busy"], results[part]["kinds"]
            added = kinds["running server"]["added_s"][1]
            rows.append(_at_most(f"{part}: seconds added against a running server", added, MOST_ADDED_S, busy))
    if "cached" in results:
        busy, kinds = results["cached"]["busy"], results["cached"]["kinds"]
        for kind, most in (("running server", MOST_CACHED_RUNNING_S), ("embedded server", MOST_CACHED_EMBEDDED_S)):
            rows.append(_at_most(f"cached: seconds with the {kind}", kinds[kind]["wall_s"][1], most, busy))
        help_s = results["cached"]["help_s"][1]
        rows.append(_at_most("seconds of python -m flows --help", help_s, MOST_HELP_S, busy))
    if "matrix" in results:
        figures = results["matrix"]
        share = figures["share_of_linear"]
        once = figures["passed"] == figures["cells"] == figures["versions"] == figures["registered_once"]
        goal = f"matrix: share of linear, at least {LEAST_OF_LINEAR}"
        rows.append((goal, f"{share:.2f}", _word(share >= LEAST_OF_LINEAR, figures["busy"])))
        rows.append(("matrix: every cell passes and is registered once", str(figures["passed"]), _word(once, "")))
    return rows


def write_page(answer: Figures, path: Path) -> None:
    """Write the page as Markdown."""
    machine = ", ".join(f"{name} {value}" for name, value in answer["environment"].items())
    parts = [
        _INTRODUCTION,
        f"Machine and versions: {machine}.\n",
        "## Goals\n",
        _table(goal_rows(answer["results"])),
    ]
    for part in [part for part in _TITLES if part in answer["results"]]:
        figures = answer["results"][part]
        parts.append(f"## {_TITLES[part]}\n")
        if figures["busy"]:
            parts.append(f"**Measured on a busy machine:** {figures['busy']}.\n")
        if part == "matrix":
            parts += [_matrix_words(figures), _table(matrix_rows(figures))]
        else:
            first = ", ".join(f"{kind} {seconds:.1f} s" for kind, seconds in figures["first_s"].items())
            parts += [
                _table(run_rows(figures)),
                f"{figures['rounds']} rounds. The very first runs, with an empty store and for the embedded "
                f"server with a new database, took: {first}.\n",
            ]
    path.write_text("\n".join(parts), "utf-8")


def _matrix_words(figures: Figures) -> str:
    return (
        f"{figures['cells']} cells of small models on Postgres, with {figures['workers']} workers that run one "
        "cell at a time on one thread. When half of the cells are registered, one worker and its run are killed "
        "with SIGKILL; an automation finds the lost run, and another worker does its cell. Linear is the time of "
        "one cell after another on the same workers, divided by the number of processors.\n"
    )


def _at_most(goal: str, value: float, most: float, busy: str) -> tuple[str, str, str]:
    return f"{goal}, at most {most:g}", f"{value:.2f}", _word(value <= most, busy)


def _word(is_met: bool, busy: str) -> str:
    return "yes" if is_met else "unknown: busy machine" if busy else "no"


def _seconds(quartiles: Sequence[float]) -> str:
    low, median, high = quartiles
    return f"{median:.2f} s ({low:.2f} to {high:.2f})"


def _table(rows: Rows) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:], ""])
