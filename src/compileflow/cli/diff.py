"""diff: compare two artifacts or reports. Reads JSON and opens no compiled file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compileflow.cli.common import (
    FAILED,
    WRONG_REQUEST,
    AsJson,
    artifact_location,
    fail,
    one_line_errors,
    store_of,
    stored_folder,
)
from compileflow.cli.output import say_json
from compileflow.cli.tables import output_console, print_lines, print_table
from compileflow.errors import CompileflowError

if TYPE_CHECKING:
    from compileflow.admin.difference import Difference, Row, Side

_HELP = (
    "Folder, URI or digest of an artifact or a report, registry:NAME@STAGE or registry:NAME@NUMBER, or the JSON "
    "file of a report."
)


@one_line_errors
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help=_HELP)],
    b: Annotated[str, typer.Argument(metavar="B", help="As A.")],
    show_all: Annotated[bool, typer.Option("--all", help="Also show what is equal.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare two artifacts or reports: what differs, and why the compile of B did not find A in the cache.

    An artifact comes with the last report on it, and a report with its artifact, if the store holds them. The exit
    code is 0 if they could be compared.
    """
    from compileflow.admin.difference import compare
    from compileflow.contracts import without_credentials

    locations = {"A": a, "B": b}
    try:
        sides = {name: _side(location) for name, location in locations.items()}
    except CompileflowError as error:
        # The request names nothing but the two locations.
        fail(error, FAILED if error.retryable else WRONG_REQUEST, as_json=as_json)
    difference = compare(sides["A"], sides["B"])
    if not show_all:
        difference = difference.model_copy(update={"rows": tuple(row for row in difference.rows if not row.equal)})
    titles = {name: without_credentials(location) for name, location in locations.items()}
    if as_json:
        values = {
            name.lower(): {"location": titles[name], "artifact_digest": side.digest}
            for name, side in sides.items()
        }
        say_json(values | difference.model_dump(mode="json"))
        return
    print_lines(
        output_console(),
        *(f"{name}: {titles[name]}, artifact {side.digest[:12]}" for name, side in sides.items()),
    )
    _print_difference(difference)


def _side(text: str) -> Side:
    from compileflow.admin.sides import read_side
    from compileflow.catalog import open_store

    location = artifact_location(text)
    with stored_folder(location) as path:
        return read_side(path, open_store(store_of(location)), location=text)


def _print_difference(difference: Difference) -> None:
    table, reasons = [], []
    for row in difference.rows:
        if (row.group, row.name) == ("verdict", "reason"):
            # Too long for a table.
            reasons = [f"{name}: {reason}" for name, reason in (("A", row.a), ("B", row.b)) if reason]
        else:
            table.append((row.group, row.name, _cell(row, row.a), _cell(row, row.b)))
    if table:
        print_table(("group", "name", "A", "B"), table, wrapped=True)
    else:
        reasons = ["Nothing that is on record differs.", *reasons]
    titled = {"cache": difference.cache, "not fair": difference.unfair, "not compared": difference.not_compared}
    notes = [f"{title}: {line}" for title, lines in titled.items() for line in lines]
    print_lines(output_console(), *reasons, *notes)


def _cell(row: Row, value: Any) -> str:
    from compileflow.validation.report import megabytes

    if value is None:
        return "-"
    if row.group == "files":
        return f"{value['size_bytes']} bytes, {_text(value['sha256'])}"
    if row.group == "size":
        return megabytes(value)
    if row.group == "gates":
        measured = "no number" if value["measured"] is None else f"{value['measured']:.4g}"
        return f"{value['outcome']}: {measured} ({value['comparison']} {value['limit']:.4g})"
    return _latency(value) if row.group == "latency" else _text(value)


def _latency(value: Mapping[str, Any]) -> str:
    from compileflow.validation.report import fraction

    ratio, low, high = (fraction(value[name]) for name in ("ratio", "ratio_low", "ratio_high"))
    mark = ", busy machine" if value["busy"] else ""
    return f"{ratio} of eager ({low} to {high}), {value['candidate_p50_ms']:.2f} ms{mark}"


def _text(value: Any) -> str:
    """Return a JSON value in a few words; of a digest, the first twelve digits."""
    from compileflow.stores.layout import is_digest

    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(item)}" for name, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:12] if is_digest(text) else text or "none"
