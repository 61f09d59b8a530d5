"""The picture of a comparison, laid out for the page: latency across, accuracy loss upwards, size as area."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from compileflow.selection.candidates import Candidate
from compileflow.selection.labels import Label, Spot, place_labels
from compileflow.validation.report import megabytes, percent

WIDTH, HEIGHT = 760, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 18, 16, 50
# Below no change at all, so that what stands there is not cut in half.
_FLOOR = 26
_LARGEST, _SMALLEST = 17.0, 4.0

Kind = Literal["chosen", "front", "passed", "dropped"]
_KINDS = get_args(Kind)


@dataclass(frozen=True)
class Axes:
    """The largest values that are drawn, both axes from 0: fraction of eager's latency, share of decisions."""

    latency: float
    loss: float

    @staticmethod
    def of(candidates: Sequence[Candidate]) -> Axes:
        """Take the limits from those that passed or warned: a broken candidate must not squeeze the others."""
        drawn = [each for each in candidates if is_drawn(each)]
        sound = [each for each in drawn if each.outcome in ("pass", "warn")] or drawn
        return Axes(
            latency=1.08 * max([1.0, *(each.latency_ratio or 0.0 for each in sound)]),
            loss=1.15 * max([0.005, *(each.accuracy_loss or 0.0 for each in sound)]),
        )

    def place(self, candidate: Candidate) -> tuple[float, float]:
        """Return where it stands on both axes, 0 to 1; what is beyond stands at the edge."""
        return (
            min(1.0, (candidate.latency_ratio or 0.0) / self.latency),
            min(1.0, (candidate.accuracy_loss or 0.0) / self.loss),
        )

    def beyond(self, candidate: Candidate) -> str:
        """Return the numbers of one that stands at the edge."""
        ratio, loss = candidate.latency_ratio or 0.0, candidate.accuracy_loss or 0.0
        numbers = [f"{ratio:.2f}"] * (ratio > self.latency) + [percent(loss)] * (loss > self.loss)
        return f" ({', '.join(numbers)})" if numbers else ""


@dataclass(frozen=True)
class Dot:
    """One candidate in the picture: its circle and its label; lengths in pixels."""

    key: str
    kind: Kind
    title: str
    spot: Spot
    label: Label


@dataclass(frozen=True)
class Scatter:
    """The picture: what the template draws."""

    dots: tuple[Dot, ...]
    front: str
    latency_ticks: tuple[tuple[float, str], ...]
    loss_ticks: tuple[tuple[float, str], ...]
    eager_x: float
    floor_y: float
    left: float = _LEFT
    right: float = WIDTH - _RIGHT
    top: float = _TOP
    bottom: float = HEIGHT - _BOTTOM
    width: float = WIDTH
    height: float = HEIGHT


def key(position: int) -> str:
    """Return a candidate's letter: A, B, ... Z, AA, AB, ..."""
    rest, letter = divmod(position, 26)
    return (key(rest - 1) if rest else "") + chr(ord("A") + letter)


def is_drawn(candidate: Candidate) -> bool:
    """Say whether it has a place in the picture."""
    return candidate.latency_ratio is not None and candidate.accuracy_loss is not None


def ticks(limit: float, count: int = 6) -> list[float]:
    """Return at most `count` round steps from 0 up to a limit."""
    rough = limit / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [round(number * step, 12) for number in range(math.floor(limit / step) + 1)]


def scatter(
    candidates: Sequence[Candidate], *, winner: int | None, front: Collection[int], dropped: Collection[int]
) -> Scatter:
    """Lay out the picture: the circles' area is the size, the line joins the front."""
    axes = Axes.of(candidates)
    wide, floor = WIDTH - _LEFT - _RIGHT, HEIGHT - _BOTTOM - _FLOOR
    largest = max((each.size_bytes or 0 for each in candidates), default=0) or 1
    spots = {}
    for position, candidate in enumerate(candidates):
        if is_drawn(candidate):
            across, up = axes.place(candidate)
            spots[position] = Spot(
                x=round(_LEFT + across * wide, 1),
                y=round(floor - up * (floor - _TOP), 1),
                radius=round(max(_SMALLEST, _LARGEST * math.sqrt((candidate.size_bytes or 0) / largest)), 1),
                text=candidate.label + axes.beyond(candidate),
                short=key(position),
            )
    kinds = {position: _kind(position, winner, front, dropped) for position in spots}
    # What matters most gets its label first, while there is room.
    order = sorted(spots, key=lambda position: (_KINDS.index(kinds[position]), position))
    labels = place_labels([spots[n] for n in order], bounds=(_LEFT, 2, WIDTH - 2, HEIGHT - _BOTTOM))
    dots = [
        Dot(key(n), kinds[n], _title(candidates[n]), spots[n], label)
        for n, label in zip(order, labels, strict=True)
    ]
    joined = sorted((spots[n].x, -spots[n].y) for n in front if n in spots)
    return Scatter(
        # Small circles last, on top of large ones.
        dots=tuple(sorted(dots, key=lambda dot: -dot.spot.radius)),
        front=" ".join(f"{x},{-y}" for x, y in joined),
        latency_ticks=tuple(
            (round(_LEFT + tick / axes.latency * wide, 1), f"{tick:g}") for tick in ticks(axes.latency)
        ),
        loss_ticks=tuple(
            (round(floor - tick / axes.loss * (floor - _TOP), 1), f"{tick * 100:g} %") for tick in ticks(axes.loss)
        ),
        eager_x=round(_LEFT + wide / axes.latency, 1),
        floor_y=floor,
    )


def _kind(position: int, winner: int | None, front: Collection[int], dropped: Collection[int]) -> Kind:
    if position == winner:
        return "chosen"
    if position in dropped:
        return "dropped"
    return "front" if position in front else "passed"


def _title(candidate: Candidate) -> str:
    parts = [
        f"{candidate.label}: {candidate.outcome}",
        f"{candidate.latency_ratio or 0.0:.2f} of eager's latency",
        f"{percent(candidate.accuracy_loss or 0.0)} of decisions changed",
    ]
    if candidate.size_bytes is not None:
        parts.append(megabytes(candidate.size_bytes))
    if candidate.compile_duration_s is not None:
        parts.append(f"compiled in {candidate.compile_duration_s:.0f} s")
    return ", ".join(parts)
