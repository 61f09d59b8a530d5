"""Paired timings: taken in turn, enough of them, and neutral."""

from __future__ import annotations

import time

import numpy as np
import pytest

from compileflow.validation.measure import latency
from compileflow.validation.measure.latency import time_pairs


def _work(size: int) -> object:
    return np.sort(np.random.default_rng(0).normal(size=size))


def test_calls_are_interleaved_and_take_turns_at_going_first() -> None:
    calls: list[str] = []
    timing = time_pairs("1 x 1", lambda: calls.append("r"), lambda: calls.append("c"), pairs=6, budget_s=60.0)
    assert timing.pairs == 6
    warm_up, timed = "".join(calls[:6]), "".join(calls[6:])
    assert warm_up == "rcrcrc"
    # Each timed call follows two untimed ones of the same model.
    assert timed == "rrrccccccrrr" * 3


def test_a_function_against_itself_has_a_ratio_of_about_one() -> None:
    timing = time_pairs("same", lambda: _work(20_000), lambda: _work(20_000), pairs=60, budget_s=20.0)
    assert timing.ratio == pytest.approx(1.0, abs=0.25)
    assert timing.ratio_low <= timing.ratio <= timing.ratio_high
    # A shared machine shifts medians by a few per cent; the interval need not hold 1 exactly.
    assert timing.ratio_low - 0.05 <= 1.0 <= timing.ratio_high + 0.05


def test_the_slower_candidate_is_seen_on_either_side() -> None:
    slow = time_pairs("x", lambda: _work(2_000), lambda: _work(40_000), pairs=15, budget_s=20.0)
    fast = time_pairs("x", lambda: _work(40_000), lambda: _work(2_000), pairs=15, budget_s=20.0)
    assert slow.ratio_low > 2.0
    assert fast.ratio_high < 0.5
    assert slow.candidate_p50_ms > slow.reference_p50_ms
    assert fast.candidate_p50_ms < fast.reference_p50_ms


def test_milliseconds_are_milliseconds() -> None:
    timing = time_pairs("sleep", lambda: time.sleep(0.005), lambda: time.sleep(0.02), pairs=5, budget_s=5.0)
    assert 5.0 <= timing.reference_p50_ms < 500.0
    assert 20.0 <= timing.candidate_p50_ms < 2000.0


def test_a_spent_budget_still_gives_five_pairs() -> None:
    timing = time_pairs("sleep", lambda: time.sleep(0.002), lambda: time.sleep(0.002), pairs=1000, budget_s=1e-6)
    assert timing.pairs == 5


def test_a_budget_ends_the_pairs() -> None:
    timing = time_pairs("sleep", lambda: time.sleep(0.005), lambda: time.sleep(0.005), pairs=1000, budget_s=0.2)
    assert 5 <= timing.pairs <= 20


@pytest.mark.parametrize(
    ("ratios", "median", "low", "high"),
    [
        # The median of 5 draws is the smallest value with probability P(Bin(5, 1/5) >= 3) = 5.8 %, above 2.5 %.
        ((0.9, 0.5, 0.7, 0.6, 0.8), 0.7, 0.5, 0.9),
        # Of 11 it is at most the second smallest with 0.7 %, and at most the third smallest with 5.1 %.
        ((0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1), 0.6, 0.3, 0.9),
        ((0.5,) * 8, 0.5, 0.5, 0.5),
    ],
)
def test_interval_is_the_one_that_resampling_the_median_gives(
    monkeypatch: pytest.MonkeyPatch, ratios: tuple[float, ...], median: float, low: float, high: float
) -> None:
    monkeypatch.setattr(latency, "_times", lambda call, *, is_long: (call(), 1.0))
    # Three warm-up calls come first.
    seconds = iter((1.0, 1.0, 1.0, *ratios))
    timing = time_pairs("x", lambda: 1.0, lambda: next(seconds), pairs=len(ratios), budget_s=60.0)
    assert (timing.ratio, timing.ratio_low, timing.ratio_high) == pytest.approx((median, low, high))
    assert (timing.reference_p50_ms, timing.candidate_p50_ms) == pytest.approx((1000.0, 1000.0 * median))


def test_processor_time_that_the_system_does_not_tell_is_no_ratio() -> None:
    wall_s = np.full((5, 2), 0.01)
    assert latency.Rounds(wall_s, np.zeros((5, 2))).latency("1 x 16").cpu_ratio is None
    assert latency.Rounds(wall_s, np.full((5, 2), 0.01)).latency("1 x 16").cpu_ratio == 1
