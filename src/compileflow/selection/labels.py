"""Labels beside circles, placed one after the other where they hide nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Anchor = Literal["start", "middle", "end"]
# Left, top, right and bottom, in pixels.
Box = tuple[float, float, float, float]

# Of the 12-pixel type that the page draws them in.
_CHARACTER, _ASCENT, _DESCENT, _LINE = 6.4, 10.0, 3.0, 15.0
_GAP = 4.0


@dataclass(frozen=True)
class Spot:
    """A circle that wants a label: the text, or where there is no room for it, the short form."""

    x: float
    y: float
    radius: float
    text: str
    short: str

    @property
    def box(self) -> Box:
        """What it covers."""
        return self.x - self.radius, self.y - self.radius, self.x + self.radius, self.y + self.radius


@dataclass(frozen=True)
class Label:
    """A text at its baseline; with a leader it stands so far away that a line must lead to it."""

    text: str
    x: float
    y: float
    anchor: Anchor
    leader: bool = False

    @property
    def box(self) -> Box:
        """What it covers, by the mean width of a character."""
        wide = len(self.text) * _CHARACTER
        left = self.x - {"start": 0.0, "middle": wide / 2, "end": wide}[self.anchor]
        return left, self.y - _ASCENT, left + wide, self.y + _DESCENT


def place_labels(spots: Sequence[Spot], *, bounds: Box) -> list[Label]:
    """Place a label for each circle, the first circle first.

    A label takes the first place, of those near its circle, where it covers no circle and no label before it.
    Where there is none, its short form does; where that has none either, it stands to the right regardless.

    Args:
        spots: The circles.
        bounds: What no label may leave.
    """
    taken = [spot.box for spot in spots]
    labels = []
    for spot in spots:
        tried = (label for text in (spot.text, spot.short) for label in _places(spot, text))
        free = (
            label
            for label in tried
            if _inside(label.box, bounds) and not any(_overlap(label.box, box) for box in taken)
        )
        label = next(free, Label(spot.short, spot.x + spot.radius + _GAP, spot.y + 4, "start"))
        taken.append(label.box)
        labels.append(label)
    return labels


def _places(spot: Spot, text: str) -> Iterator[Label]:
    """Right, left, above, below, then the same from further away, with a leader."""
    aside = spot.radius + _GAP
    for step in range(4):
        for down in (0.0,) if step == 0 else (-step * _LINE, step * _LINE):
            sideways = aside if step == 0 else aside + _GAP
            yield Label(text, round(spot.x + sideways, 1), round(spot.y + 4 + down, 1), "start", step > 0)
            yield Label(text, round(spot.x - sideways, 1), round(spot.y + 4 + down, 1), "end", step > 0)
        further = step * _LINE
        yield Label(text, spot.x, round(spot.y - aside - further, 1), "middle", step > 0)
        yield Label(text, spot.x, round(spot.y + aside + _ASCENT + further, 1), "middle", step > 0)


def _inside(box: Box, bounds: Box) -> bool:
    return box[0] >= bounds[0] and box[1] >= bounds[1] and box[2] <= bounds[2] and box[3] <= bounds[3]


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
