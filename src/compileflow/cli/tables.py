"""Tables for terminals of any width: fewer columns where it is narrow, and lines where even those do not fit.

Cells may come from a stranger's file, so control characters are shown escaped.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from compileflow.cli.output import plain
from compileflow.errors import printable

# Wider than any table: without a terminal, rich would fold columns at 80 characters.
_NO_LIMIT = 10_000


def output_console() -> Console:
    """Return the console for standard output; its width is the terminal's, or that of COLUMNS."""
    # A process may be started without a standard output.
    has_width = (sys.stdout is not None and sys.stdout.isatty()) or "COLUMNS" in os.environ
    return Console(width=None if has_width else _NO_LIMIT)


def print_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str = "",
    optional: Collection[str] = (),
    wrapped: bool = False,
) -> None:
    """Print rows as a table if it fits, without some optional columns if need be, or else one block per row.

    Args:
        header: Titles of the columns, as text without markup.
        rows: Cells of each row, as text without markup.
        title: Title of the table.
        optional: Titles of columns that may be left out, in the order of leaving out.
        wrapped: Whether cells may be wrapped between words.
    """
    console = output_console()
    left_out: list[str] = []
    for column in ("", *optional):
        left_out += [column] if column else []
        positions = [position for position, name in enumerate(header) if name not in left_out]
        table = Table(title=plain(title) if title else None)
        for position in positions:
            table.add_column(plain(header[position]))
        for row in rows:
            table.add_row(*(Text(printable(row[position]), overflow="fold") for position in positions))
        if _fits(table, console, wrapped=wrapped):
            console.print(table)
            if left_out:
                print_lines(console, f"Not shown for lack of width: {', '.join(left_out)}.")
            return
    print_lines(console, *filter(None, [title]))
    for row in rows:
        lines = (f"{name}: {cell}" if name else cell for name, cell in zip(header, row, strict=True) if cell)
        print_lines(console, *lines, "")


def print_record(values: Mapping[str, str]) -> None:
    """Print names and values as a table if it fits, or else one per line."""
    console = output_console()
    table = Table(show_header=False)
    for name, value in values.items():
        table.add_row(plain(name), plain(value))
    if _fits(table, console):
        console.print(table)
    else:
        print_lines(console, *(f"{name}: {value}" for name, value in values.items()))


def print_lines(console: Console, *lines: str) -> None:
    """Print lines of any length, which the terminal wraps."""
    for line in lines:
        console.print(plain(line), soft_wrap=True, highlight=False)


def _fits(table: Table, console: Console, *, wrapped: bool = False) -> bool:
    widths = console.measure(table, options=console.options.update(width=_NO_LIMIT))
    return (widths.minimum if wrapped else widths.maximum) <= console.width
