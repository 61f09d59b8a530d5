"""Bounds of a rate against the definition, the closed forms and worked-out values; no other code computes them."""

from __future__ import annotations

import doctest
import math

import pytest

from compileflow.validation.judge import rates
from compileflow.validation.judge.rates import rate_bounds, trials_to_decide

# The 95th percentile of the normal distribution, from a table.
Z = 1.644854


def test_doctest_holds() -> None:
    result = doctest.testmod(rates)
    assert (result.attempted, result.failed) == (1, 0)


@pytest.mark.parametrize(("hits", "trials"), [(90, 100), (15, 148), (81, 263), (1, 29), (399_990, 400_000)])
def test_each_bound_is_a_rate_that_the_score_test_just_accepts(hits: int, trials: int) -> None:
    # Wilson's definition: the observed rate lies z standard errors, of the bound itself, away from the bound.
    lower, upper = rate_bounds(hits, trials)
    observed = hits / trials
    assert (observed - lower) / math.sqrt(lower * (1 - lower) / trials) == pytest.approx(Z, abs=1e-5)
    assert (upper - observed) / math.sqrt(upper * (1 - upper) / trials) == pytest.approx(Z, abs=1e-5)


@pytest.mark.parametrize(
    ("hits", "trials", "bounds"),
    [
        # (0.9 + z^2/200 -+ z sqrt(0.0009 + z^2/40000)) / (1 + z^2/100)
        (90, 100, (0.839644, 0.939282)),
        # Without a miss n / (n + z^2), without a hit z^2 / (n + z^2): 2.705543 is z^2.
        (268, 268, (268 / 270.705543, 1.0)),
        (0, 20, (0.0, 2.705543 / 22.705543)),
        (0, 0, (0.0, 1.0)),
    ],
)
def test_bounds_worked_out_by_hand(hits: int, trials: int, bounds: tuple[float, float]) -> None:
    assert rate_bounds(hits, trials) == pytest.approx(bounds, abs=1e-6)


def test_268_hits_in_a_row_show_99_percent_and_267_do_not() -> None:
    # n / (n + 2.705543) >= 0.99 needs n >= 99 * 2.705543 = 267.85.
    assert rate_bounds(268, 268)[0] >= 0.99
    assert rate_bounds(267, 267)[0] < 0.99


@pytest.mark.parametrize(
    ("hits", "trials", "gate", "more"),
    [
        # 267.85 faultless trials reach 0.99, and 20 of them are done.
        (20, 20, 0.99, 248),
        # n / (n + 2.705543) >= 0.98 needs n >= 49 * 2.705543 = 132.57.
        (100, 100, 0.98, 33),
        # 95 % is far below 0.99: the upper bound is below it already.
        (95, 100, 0.99, 0),
    ],
)
def test_trials_to_decide_worked_out_by_hand(hits: int, trials: int, gate: float, more: int) -> None:
    assert trials_to_decide(hits, trials, gate) == more


def test_a_rate_equal_to_the_limit_is_never_decided() -> None:
    assert trials_to_decide(99, 100, 0.99) is None


@pytest.mark.parametrize(("worse", "better", "p"), [(0, 0, 1.0), (5, 0, 0.0625), (3, 3, 1.0), (9, 1, 22 / 1024)])
def test_mcnemar_is_the_sign_test_of_the_changes(worse: int, better: int, p: float) -> None:
    # Of 10 changes, 9 or more go one way with probability 2 * (10 + 1) / 2^10.
    assert rates.mcnemar_p(worse, better) == pytest.approx(p)
    assert rates.mcnemar_p(better, worse) == pytest.approx(p)


def test_the_smallest_loss_that_shows_is_the_rule_of_three() -> None:
    # (1 - loss)^n = 0.05, so that loss is about 3 / n.
    for trials in (30, 300, 3000):
        assert (1 - rates.smallest_loss(trials)) ** trials == pytest.approx(0.05)
        assert rates.smallest_loss(trials) == pytest.approx(3 / trials, rel=0.05)


def test_the_exact_test_is_a_sum_of_binomial_probabilities() -> None:
    expected = sum(math.comb(10, hits) * 0.9**hits * 0.1 ** (10 - hits) for hits in range(8))
    assert rates.chance_of_fewer(7, 10, 0.9) == pytest.approx(expected)


def test_holm_divides_the_level_by_the_hypotheses_that_remain() -> None:
    levels = rates.holm_levels({"a": 0.001, "b": 0.004, "c": 0.02, "d": 0.9}, 0.01)
    # 0.01 / 4 accepts 0.001; 0.01 / 3 does not accept 0.004, and no later one is rejected.
    assert levels == {"a": 0.01 / 4, "b": 0.01 / 3, "c": 0.01 / 3, "d": 0.01 / 3}


def test_a_suite_of_honest_rates_is_refused_in_less_than_one_of_a_hundred_runs() -> None:
    import numpy as np

    random = np.random.default_rng(1)
    limits = {"labels": 0.99, "spans": 0.98, "neighbours": 0.95}
    refused = 0
    for _ in range(300):
        hits = {name: int(random.binomial(300, limit)) for name, limit in limits.items()}
        p_values = {name: rates.chance_of_fewer(hits[name], 300, limit) for name, limit in limits.items()}
        levels = rates.holm_levels(p_values)
        refused += any(p_values[name] <= levels[name] for name in limits)
    assert refused / 300 < 0.01 + 2 * math.sqrt(0.01 * 0.99 / 300)
