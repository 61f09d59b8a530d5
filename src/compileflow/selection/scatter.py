"""The scatter plot of a comparison: latency across, accuracy loss upwards, size as area."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from compileflow.contracts import ACCEPTED_OUTCOMES
from compileflow.selection.candidates import Candidate
from compileflow.validation.report import fraction, megabytes, percent
from compileflow.validation.report.picture import COLOURS, new_picture, svg, text_style

if TYPE_CHECKING:
    from markupsafe import Markup

_HEIGHT = 330
# Diameters in points; the smallest is still easy to see.
_LARGEST, _SMALLEST = 30.0, 9.0
# Circles that are closer than this share of the axes get one label together.
_SAME_PLACE = 0.05


def letter(position: int) -> str:
    """Return the letter of a candidate: A, B, ... Z, AA, AB, ..."""
    prefix_number, letter_index = divmod(position, 26)
    return (letter(prefix_number - 1) if prefix_number else "") + chr(ord("A") + letter_index)


def scatter(
    candidates: Sequence[Candidate],
    *,
    winner: int | None,
    front: Collection[int],
    drops: Collection[int],
    description: str,
) -> Markup | None:
    """Draw the candidates that were timed and measured; None if there are none.

    A candidate beyond the axes stands at their edge, with its numbers beside it.

    Args:
        candidates: All candidates of the comparison.
        winner: Position of the candidate that was chosen.
        front: Positions of the candidates on the Pareto front, which a line joins.
        drops: Positions of the candidates that cannot be chosen, which are drawn hollow.
        description: Text alternative of the picture.
    """
    points = {
        position: (candidate.latency_ratio, candidate.accuracy_loss)
        for position, candidate in enumerate(candidates)
        if candidate.latency_ratio is not None and candidate.accuracy_loss is not None
    }
    if not points:
        return None
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    # A broken candidate must not compress the others into a corner.
    reference_points = [
        place for position, place in points.items() if candidates[position].outcome in ACCEPTED_OUTCOMES
    ]
    reference_points = reference_points or list(points.values())
    x_limit = 1.08 * max(1.0, *(ratio for ratio, _ in reference_points))
    y_limit = 1.15 * max(0.005, *(loss for _, loss in reference_points))
    places = {position: (min(ratio, x_limit), min(loss, y_limit)) for position, (ratio, loss) in points.items()}
    figure, axes = new_picture(_HEIGHT)
    # Room below zero, so that circles without loss stand clear of the axis.
    axes.set_xlim(0, x_limit)
    axes.set_ylim(-0.09 * y_limit, y_limit)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: percent(loss)))
    axes.set_xlabel("latency as a fraction of eager's, mean over the shapes", **text_style("soft"))
    axes.set_ylabel("decisions changed", **text_style("soft"))
    axes.axvline(1.0, color=COLOURS["soft"], linewidth=1, linestyle=(0, (5, 4)), clip_on=False)
    axes.text(1.0, 1.01 * y_limit, "eager", ha="center", va="bottom", **text_style("soft"))
    line = sorted(places[position] for position in front if position in places)
    axes.plot(
        [x for x, _ in line],
        [y for _, y in line],
        color=COLOURS["front"],
        linewidth=1.5,
        alpha=0.7,
        clip_on=False,
        zorder=1,
    )
    largest = max((candidate.size_bytes or 0 for candidate in candidates), default=0) or 1
    diameters = {
        position: max(_SMALLEST, _LARGEST * math.sqrt((candidates[position].size_bytes or 0) / largest))
        for position in places
    }
    # Small circles come last, on top of large ones.
    for position in sorted(places, key=lambda position: -(candidates[position].size_bytes or 0)):
        diameter = diameters[position]
        colour = COLOURS[
            "pass" if position == winner else "front" if position in front and position not in drops else "rest"
        ]
        axes.scatter(
            [places[position][0]],
            [places[position][1]],
            s=diameter**2,
            facecolors="none" if position in drops and position != winner else (colour, 0.5),
            edgecolors=colour,
            linewidths=3 if position == winner else 1.5,
            # Even solid outlines get a pattern: matplotlib writes circles without one as references.
            linestyles=(0, (2, 2) if position in drops and position != winner else (1, 0)),
            clip_on=False,
            zorder=2,
            gid=f"candidate-{position}",
        )
    for group in _neighbours(places, x_limit, y_limit):
        x, y = places[group[0]]
        offset = 4 + max(diameters[position] for position in group) / 2
        label = ", ".join(letter(position) + _beyond(points[position], x_limit, y_limit) for position in group)
        axes.annotate(
            label,
            (x, y),
            (0, -offset if y == y_limit else offset),
            textcoords="offset points",
            ha="right" if x > 0.85 * x_limit else "left" if x < 0.1 * x_limit else "center",
            va="top" if y == y_limit else "bottom",
            annotation_clip=False,
            **text_style(fontweight="bold" if winner in group else "normal"),
        )
    return svg(
        figure,
        name="comparison-picture",
        title="Decisions changed against latency, one circle per candidate",
        description=description,
        titles={f"candidate-{position}": _title(position, candidates[position]) for position in places},
    )


def _neighbours(places: dict[int, tuple[float, float]], x_limit: float, y_limit: float) -> list[list[int]]:
    """Group positions whose circles are too close for two labels."""
    groups: list[list[int]] = []
    for position in sorted(places):
        for group in groups:
            x, y = places[group[0]]
            if (
                abs(places[position][0] - x) < _SAME_PLACE * x_limit
                and abs(places[position][1] - y) < _SAME_PLACE * y_limit
            ):
                group.append(position)
                break
        else:
            groups.append([position])
    return groups


def _beyond(place: tuple[float, float], x_limit: float, y_limit: float) -> str:
    ratio, loss = place
    numbers = [fraction(ratio)] * (ratio > x_limit) + [percent(loss)] * (loss > y_limit)
    return f" ({', '.join(numbers)})" if numbers else ""


def _title(position: int, candidate: Candidate) -> str:
    parts = [
        f"{letter(position)}: {candidate.label}: {candidate.outcome}",
        f"{fraction(candidate.latency_ratio or 0.0)} of eager's latency",
        f"{percent(candidate.accuracy_loss or 0.0)} of decisions changed",
    ]
    if candidate.size_bytes is not None:
        parts.append(megabytes(candidate.size_bytes))
    if candidate.compile_duration_s is not None:
        parts.append(f"compiled in {candidate.compile_duration_s:.0f} s")
    return ", ".join(parts)
