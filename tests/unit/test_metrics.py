"""Metrics against values worked out by hand."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest

from compileflow.validation.measure import metrics


def test_doctests_of_the_metrics_hold() -> None:
    result = doctest.testmod(metrics)
    assert result.attempted == 1
    assert result.failed == 0


def test_compare_gives_the_hand_computed_numbers() -> None:
    row = metrics.compare(np.array([3.0, 4.0]), np.array([3.0, 4.5]))
    assert row["shape_matches"] == 1
    assert row["n_values"] == 2
    assert row["max_abs_diff"] == 0.5
    assert row["rel_l2"] == pytest.approx(0.5 / 5.0)
    # cos = (9 + 18) / (5 * sqrt(29.25))
    assert row["one_minus_cosine"] == pytest.approx(1 - 27 / (5 * math.sqrt(29.25)))
    assert row["tolerance_use"] == pytest.approx(0.5 / (1e-4 + 1e-3 * 4.0))


def test_tolerance_use_is_at_most_one_exactly_where_isclose_holds() -> None:
    reference = np.array([1.0, -10.0])
    for step, holds in ((0.99, True), (1.01, False)):
        candidate = reference + step * (1e-4 + 1e-3 * np.abs(reference))
        use = metrics.compare(reference, candidate)["tolerance_use"]
        assert (use <= 1) is holds
        assert bool(np.isclose(candidate, reference, rtol=1e-3, atol=1e-4).all()) is holds


def test_compare_works_in_float64() -> None:
    row = metrics.compare(np.array([1.0], np.float32), np.array([1.0 + 1e-12]))
    assert row["max_abs_diff"] == pytest.approx(1e-12, rel=1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_leaves_no_number(bad: float) -> None:
    finite, broken = np.array([1.0, 2.0, 3.0]), np.array([1.0, bad, 3.0])
    row = metrics.compare(finite, broken)
    assert (row["candidate_nonfinite_count"], row["reference_nonfinite_count"]) == (1, 0)
    names = ("max_abs_diff", "rel_l2", "one_minus_cosine", "tolerance_use")
    assert all(math.isnan(row[name]) for name in names)
    # Equal infinities on both sides are not agreement.
    twice = metrics.compare(broken, broken)
    assert (twice["candidate_nonfinite_count"], twice["reference_nonfinite_count"]) == (1, 1)
    assert all(math.isnan(twice[name]) for name in names)


@pytest.mark.parametrize("candidate", [np.ones((2, 1)), np.ones(3), np.empty(0)])
def test_another_shape_leaves_no_number_although_numpy_would_broadcast(candidate: np.ndarray) -> None:
    row = metrics.compare(np.ones(2), candidate)
    assert row["shape_matches"] == 0
    assert math.isnan(row["max_abs_diff"])


def test_empty_arrays_do_not_agree() -> None:
    assert math.isnan(metrics.compare(np.empty(0), np.empty(0))["rel_l2"])


def test_rel_l2_of_zero_vectors() -> None:
    zero, unit = np.zeros(2), np.array([0.0, 1.0])
    assert metrics.rel_l2(zero, zero) == 0.0
    assert metrics.rel_l2(zero, unit) == math.inf
    assert metrics.rel_l2(unit, zero) == 1.0


def test_cosine_at_its_landmarks() -> None:
    x, y = np.array([2.0, 0.0]), np.array([0.0, 5.0])
    assert metrics.one_minus_cosine(x, 3 * x) == 0.0
    assert metrics.one_minus_cosine(x, y) == pytest.approx(1.0)
    assert metrics.one_minus_cosine(x, -x) == pytest.approx(2.0)
    assert metrics.one_minus_cosine(x, 0 * x) == 1.0
    assert metrics.one_minus_cosine(0 * x, 0 * x) == 0.0


def test_cosine_is_exact_near_zero() -> None:
    # 1 - cos(angle) is angle^2 / 2 for small angles; subtracting cosines would give 0 here.
    angle = 1e-9
    turned = np.array([math.cos(angle), math.sin(angle)])
    assert metrics.one_minus_cosine(np.array([1.0, 0.0]), turned) == pytest.approx(angle**2 / 2, rel=1e-6)


def test_margins_are_differences_of_probabilities() -> None:
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.45, 0.45, 0.1]]))
    assert metrics.margins(logits) == pytest.approx([0.5, 0.0])
    assert metrics.softmax(np.array([1000.0, 1000.0])) == pytest.approx([0.5, 0.5])
    assert metrics.margins(np.array([[3.0], [4.0]])).tolist() == [1.0, 1.0]


def test_overlap_at_counts_shared_best_choices() -> None:
    reference = np.array([9.0, 8.0, 7.0, 1.0, 0.0])
    assert metrics.overlap_at(reference, reference[::-1], 2) == 0
    assert metrics.overlap_at(reference, np.array([8.0, 9.0, 0.0, 1.0, 0.5]), 2) == 2
    assert metrics.overlap_at(reference, np.array([9.0, 0.0, 7.0, 8.0, 0.0]), 3) == 2
    assert metrics.overlap_at(reference, reference, 10) == 5


def test_neighbour_overlap_counts_the_neighbours_that_stay() -> None:
    degrees = np.array([0.0, 10.0, 25.0, 90.0])
    moved = np.array([0.0, 10.0, 80.0, 90.0])
    before, after = (np.stack([np.cos(a), np.sin(a)], axis=1) for a in np.radians([degrees, moved]))
    # Nearest other of each, before: 1, 0, 1, 2; after: 1, 0, 3, 2.
    assert metrics.neighbour_overlaps(before, after, 1) == [1, 1, 0, 1]
    assert metrics.neighbour_overlaps(before, before * 7.0, 1) == [1, 1, 1, 1]
    # An example is not its own neighbour, so each of 4 examples has 3.
    assert metrics.neighbour_overlaps(before, after, 10) == [3, 3, 3, 3]


@pytest.fixture
def logits() -> np.ndarray:
    return np.random.default_rng(3).normal(size=(50, 4))


def test_permuted_columns_are_misplaced_labels(logits: np.ndarray) -> None:
    assert metrics.misplaced_labels(logits, logits[:, [1, 0, 2, 3]]) == 2
    assert metrics.misplaced_labels(logits, logits[:, [1, 2, 3, 0]]) == 4


def test_noise_does_not_misplace_labels(logits: np.ndarray) -> None:
    assert metrics.misplaced_labels(logits, logits) == 0
    noise = np.random.default_rng(4).normal(scale=0.3, size=logits.shape)
    assert metrics.misplaced_labels(logits, logits + noise) == 0


def test_equal_columns_are_not_misplaced(logits: np.ndarray) -> None:
    twins = logits[:, [0, 0, 2, 3]]
    assert metrics.misplaced_labels(twins, twins + 1e-6) == 0


def test_misplaced_labels_leaves_nan_to_the_gate_for_it(logits: np.ndarray) -> None:
    broken = logits[:, [1, 0, 2, 3]].copy()
    broken[7, 2] = np.nan
    assert metrics.misplaced_labels(logits, broken) == 0


@pytest.mark.parametrize(
    ("tags", "entities"),
    [
        (["B-PER", "I-PER", "O", "B-LOC"], {("PER", 0, 2), ("LOC", 3, 4)}),
        (["B-PER", "B-PER"], {("PER", 0, 1), ("PER", 1, 2)}),
        (["I-PER", "I-PER", "I-LOC"], {("PER", 0, 2), ("LOC", 2, 3)}),
        (["B-PER", "I-LOC", "I-LOC"], {("PER", 0, 1), ("LOC", 1, 3)}),
        (["NOUN", "NOUN", "VERB", "O"], {("NOUN", 0, 2), ("VERB", 2, 3)}),
        (["X-ray", "X-ray"], {("X-ray", 0, 2)}),
        (["O", "O"], set()),
        ([], set()),
    ],
)
def test_spans_of_bio_and_of_plain_tags(tags: list[str], entities: set[tuple[str, int, int]]) -> None:
    assert metrics.spans(tags) == entities


def test_entity_f1_counts_whole_entities_over_all_examples() -> None:
    reference = [["B-PER", "I-PER", "O"], ["B-LOC", "O", "B-LOC"]]
    candidate = [["B-PER", "O", "O"], ["B-LOC", "O", "B-LOC"]]
    # 2 of 3 against 3: the entity that was cut short counts as missed and as invented.
    assert metrics.entity_f1(reference, candidate) == pytest.approx(2 * 2 / 6)
    assert metrics.entity_f1(reference, reference) == 1.0
    assert metrics.entity_f1([["O"]], [["O"]]) == 1.0
    assert metrics.entity_f1([["O"]], [["B-PER"]]) == 0.0


def scaled_rows(pairs: list[tuple[list[float], list[float]]]) -> list[dict[str, float]]:
    rows = [{"output": "logits"} | metrics.compare(np.array(r), np.array(c)) for r, c in pairs]
    metrics.relate_to_scale(rows, metrics.scales_of(rows))
    return rows


def test_a_small_answer_is_measured_by_the_size_of_the_others() -> None:
    large = ([300.0, 400.0], [300.0, 400.0])
    rows = scaled_rows([large, large, ([3e-4, 4e-4], [3e-4, 5e-4])])
    # 1e-4 of 5e-4 alone, but the outputs are of length 500.
    assert rows[2]["rel_l2"] == pytest.approx(1e-4 / 500)
    assert rows[2]["one_minus_cosine"] < 1e-13
    assert rows[2]["scaled_diff"] == pytest.approx(1e-4 / 400)
    assert rows[2]["max_abs_diff"] == pytest.approx(1e-4)


def test_a_large_answer_is_measured_by_its_own_size() -> None:
    rows = scaled_rows([([1.0, 0.5], [1.0, 0.5])] * 3 + [([1000.0, 500.0], [1000.1, 500.0])])
    assert rows[3]["rel_l2"] == pytest.approx(0.1 / math.hypot(1000, 500))
    assert rows[3]["scaled_diff"] == pytest.approx(1e-4)


def test_outputs_below_one_are_compared_in_their_own_units() -> None:
    (row,) = scaled_rows([([0.01, 0.02], [0.01, 0.0201])])
    assert row["scaled_diff"] == pytest.approx(1e-4)


def test_one_huge_element_does_not_set_the_scale() -> None:
    reference = np.ones(9)
    reference[0] = 1e6
    row = metrics.compare(reference, reference + 1e-3)
    assert row["scaled_diff"] == pytest.approx(1e-3 / 20)


def test_zeros_agree_with_zeros_and_with_nothing_else() -> None:
    rows = scaled_rows([([0.0, 0.0], [0.0, 0.0])] * 2)
    assert [rows[0][name] for name in ("rel_l2", "one_minus_cosine", "peak_error", "scaled_diff")] == [0.0] * 4
    rows = scaled_rows([([0.0, 0.0], [0.0, 0.0]), ([0.0, 0.0], [0.0, 1e-9])])
    assert rows[1]["rel_l2"] == math.inf


def test_single_numbers_of_other_sign_are_wrong_and_near_zero_they_are_not() -> None:
    rows = scaled_rows([([1.0], [1.0]), ([-1.0], [1.0]), ([1e-3], [-1e-3])])
    assert rows[1]["one_minus_cosine"] == 2.0
    assert rows[2]["rel_l2"] == pytest.approx(2e-3)
    assert rows[2]["one_minus_cosine"] == pytest.approx(2e-6)


def test_a_neighbour_as_near_as_the_last_one_counts() -> None:
    reference, candidate = np.array([9.0, 8.0, 7.9999, 1.0]), np.array([9.0, 7.0, 8.0, 1.0])
    assert metrics.overlap_at(reference, candidate, 2) == 1
    assert metrics.overlap_at(reference, candidate, 2, tie=1e-3) == 2
    assert metrics.overlap_at(reference, np.array([0.0, 1.0, 8.0, 9.0]), 2, tie=1e-3) == 1


def test_labels_that_rounding_can_exchange_have_no_place() -> None:
    reference = np.tile([0.5, 0.501, -0.5], (4, 1))
    swapped = reference[:, [1, 0, 2]]
    assert metrics.misplaced_labels(reference, swapped) == 2
    assert metrics.misplaced_labels(reference, swapped, tolerance=1e-4) == 2
    assert metrics.misplaced_labels(reference, swapped, tolerance=1e-2) == 0
