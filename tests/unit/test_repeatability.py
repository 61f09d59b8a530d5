"""Repeatability: the same call gives the same answer, or the verdict says that it does not."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from compileflow.contracts import Arrays
from compileflow.validation.measure import Measurements, measure_repeatability

CALLS = [{"x": np.arange(rows * 3.0).reshape(rows, 3) + 1} for rows in (1, 2, 8)]
LIMIT = 1e-5


def repeat_error(candidate: Callable[[Arrays], Arrays]) -> float:
    measurements = Measurements()
    first_call = CALLS[0], candidate(CALLS[0])
    measure_repeatability(measurements, candidate, CALLS, first_call)
    return measurements.scalars["repeat_error"]


def healthy(inputs: Arrays) -> Arrays:
    return {"y": inputs["x"] * 2}


def test_a_pure_function_repeats_its_answers() -> None:
    assert repeat_error(healthy) == 0.0


def test_noise_shows_as_a_share_of_the_answer() -> None:
    random = np.random.default_rng(0)
    error = repeat_error(lambda inputs: {"y": inputs["x"] * 2 + 1e-3 * random.standard_normal(inputs["x"].shape)})
    assert 1e-4 < error < 1e-2


def test_an_answer_that_depends_on_the_call_before_shows() -> None:
    last = [0.0]

    def stateful(inputs: Arrays) -> Arrays:
        answer = inputs["x"] * 2 + 0.05 * last[0]
        last[0] = float(inputs["x"].mean())
        return {"y": answer}

    assert repeat_error(stateful) > LIMIT


@pytest.mark.parametrize("good_calls", [7, 100])
def test_an_answer_that_changes_after_many_calls_shows(good_calls: int) -> None:
    count = [0]

    def tired(inputs: Arrays) -> Arrays:
        count[0] += 1
        return {"y": inputs["x"] * (2 if count[0] <= good_calls else 3)}

    assert repeat_error(tired) == pytest.approx(0.5)


def test_a_first_answer_that_differs_from_all_others_shows() -> None:
    count = [0]

    def cold(inputs: Arrays) -> Arrays:
        count[0] += 1
        return {"y": inputs["x"] * (4 if count[0] == 1 else 2)}

    assert repeat_error(cold) == pytest.approx(0.5)


def test_calls_of_one_shape_that_share_memory_show() -> None:
    shared: dict[tuple[int, ...], Arrays] = {}

    def mixed(inputs: Arrays) -> Arrays:
        shared[inputs["x"].shape] = inputs
        time.sleep(0.001)
        return healthy(shared[inputs["x"].shape])

    assert repeat_error(mixed) > LIMIT


@pytest.mark.parametrize("again", [{}, {"y": np.zeros((1, 1))}, {"y": np.full((1, 3), np.nan)}])
def test_a_call_that_answers_once_and_then_fails_is_not_a_number(again: dict[str, Any]) -> None:
    seen = set()

    def flaky(inputs: Arrays) -> Arrays:
        rows = len(inputs["x"])
        if rows > 1 or rows not in seen:
            seen.add(rows)
            return healthy(inputs)
        if not again:
            raise RuntimeError("no memory")
        return again

    assert np.isnan(repeat_error(flaky))


def test_a_call_that_always_fails_is_left_to_other_gates() -> None:
    def small(inputs: Arrays) -> Arrays:
        if len(inputs["x"]) > 2:
            raise RuntimeError("no kernel")
        return healthy(inputs)

    assert repeat_error(small) == 0.0
