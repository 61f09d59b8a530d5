"""The picture of a comparison in letters, for terminals."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from compileflow.selection.candidates import Candidate
from compileflow.selection.pareto import Axes, is_drawn, key, ticks

_MARGIN = 8
# Columns by which a letter moves whose own place is taken; a row would be another loss altogether.
_ASIDE = (0, 1, -1, 2, -2)


def text_scatter(
    candidates: Sequence[Candidate], *, dropped: Collection[int], width: int, height: int
) -> list[str]:
    """Draw the picture in letters, capitals for those that may be chosen; a star where they hide one another."""
    axes = Axes.of(candidates)
    rows = max(4, height - 4)
    columns = max(20, width - _MARGIN)
    grid = [[" "] * columns for _ in range(rows)]
    # Those that may be chosen keep their own places; the others move aside.
    for position in sorted(range(len(candidates)), key=lambda n: n in dropped):
        candidate = candidates[position]
        if is_drawn(candidate):
            across, up = axes.place(candidate)
            column, row = round(across * (columns - 1)), round((1 - up) * (rows - 1))
            letter = key(position).lower() if position in dropped else key(position)
            _write(grid, column, row, letter)
    marks = {round((1 - tick / axes.loss) * (rows - 1)): f"{tick * 100:g} %" for tick in ticks(axes.loss, 4)}
    lines = [f"{marks.get(row, ''):>{_MARGIN - 2}} |{''.join(cells).rstrip()}" for row, cells in enumerate(grid)]
    ruler, scale = ["-"] * columns, [" "] * columns
    for tick in ticks(axes.latency):
        column = round(tick / axes.latency * (columns - 1))
        ruler[column] = "+" if tick else "-"
        text = f"{tick:g}"
        first = min(column, columns - len(text))
        scale[first : first + len(text)] = text
    return [
        "decisions changed",
        *lines,
        f"{'':{_MARGIN - 1}}+{''.join(ruler)}",
        f"{'':{_MARGIN}}{''.join(scale).rstrip()}",
        f"{'latency as a fraction of eager':>{_MARGIN + columns}}",
    ]


def _write(grid: list[list[str]], column: int, row: int, letter: str) -> None:
    line = grid[row]
    for aside in _ASIDE:
        first = min(max(0, column + aside), len(line) - len(letter))
        cells = slice(first, first + len(letter))
        if set(line[cells]) == {" "}:
            line[cells] = letter
            return
    line[column] = "*"
