"""What a picture is lettered with: labels that hide nothing, round ticks, keys."""

from __future__ import annotations

from itertools import combinations

import pytest

from compileflow.selection.labels import Spot, place_labels
from compileflow.selection.pareto import key, ticks


def test_labels_hide_neither_one_another_nor_a_circle() -> None:
    spots = [Spot(100 + 3 * n, 100 + 2 * (n % 3), 8, f"candidate number {n}", chr(65 + n)) for n in range(8)]
    bounds = (0.0, 0.0, 400.0, 300.0)
    labels = place_labels(spots, bounds=bounds)
    assert labels[0].text == "candidate number 0"
    boxes = [label.box for label in labels] + [spots[0].box]
    for one, other in combinations(boxes, 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
    assert all(box[0] >= 0 and box[1] >= 0 and box[2] <= 400 and box[3] <= 300 for box in boxes)


def test_a_label_without_room_is_cut_to_its_letter() -> None:
    (label,) = place_labels([Spot(50, 50, 5, "a very long name of a candidate", "A")], bounds=(0, 0, 100, 100))
    assert label.text == "A"


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (1.08, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.00575, [0, 0.001, 0.002, 0.003, 0.004, 0.005]),
        (30.0, [0, 5, 10, 15, 20, 25, 30]),
    ],
)
def test_ticks_are_round_steps_from_zero(limit: float, expected: list[float]) -> None:
    assert ticks(limit) == expected


def test_letters_go_on_after_z() -> None:
    assert [key(n) for n in (0, 25, 26, 27, 52, 701, 702)] == ["A", "Z", "AA", "AB", "BA", "ZZ", "AAA"]
