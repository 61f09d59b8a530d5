"""Repeatability: whether the compiled model gives the same answer to the same call, whatever was called before."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compileflow.contracts import Arrays
from compileflow.validation.measure.measurements import Measurements, Model, candidate_answer

# Inputs of a call and the compiled model's answer, empty if it failed.
Call = tuple[Arrays, Arrays]

_MOST_CALLS, _LEAST_CALLS = 300, 5
_BUDGET_S = 0.5
_THREADS, _CALLS_PER_THREAD = 4, 16
# Rows shorter than this are over too soon for threads to meet.
_LEAST_ELEMENTS = 16


def measure_repeatability(
    measurements: Measurements, candidate: Model, calls: Sequence[Arrays], first_call: Call
) -> None:
    """Call the compiled model again and compare its answers.

    The first call after the load is made again. Each other call is made twice, once after the call before it and
    once after the call behind it. Then the shortest call is made a few hundred times, and four threads make
    different calls of one shape at once, as the requests to a service.

    `repeat_error` is the largest difference between two answers to one call, as a share of the answer's largest
    element; NaN if only one of them is a finite answer.

    Args:
        measurements: Gets `repeat_error`.
        candidate: The compiled model.
        calls: Inputs of one call for each shape, the shortest first.
        first_call: First call of the compiled model after it was loaded.
    """
    answers = [candidate_answer(candidate, inputs)[0] for inputs in calls]
    # A call that fails each time is a matter of other gates.
    repeated = [(inputs, answer) for inputs, answer in zip(calls, answers, strict=True) if answer]
    errors = [_again(candidate, *first_call)]
    errors += [_again(candidate, inputs, answer) for inputs, answer in reversed(repeated)]
    if repeated:
        errors += _many_short_calls(candidate, *repeated[0])
        errors += _calls_from_threads(candidate, [inputs for inputs, _ in repeated])
    # numpy's maximum, unlike max(), never drops a NaN.
    measurements.scalars["repeat_error"] = float(np.max(errors, initial=0.0))


def _many_short_calls(candidate: Model, inputs: Arrays, answer: Arrays) -> list[float]:
    errors: list[float] = []
    end = time.perf_counter() + _BUDGET_S
    while len(errors) < _MOST_CALLS and (len(errors) < _LEAST_CALLS or time.perf_counter() < end):
        errors.append(_again(candidate, inputs, answer))
    return errors


def _calls_from_threads(candidate: Model, calls: Sequence[Arrays]) -> list[float]:
    """Make four calls of one shape in turn, and then several times from four threads at once."""
    inputs = next((call for call in calls if _main(call)[1].size >= _LEAST_ELEMENTS), calls[-1])
    name, value = _main(inputs)
    variants = [inputs | {name: np.roll(value, thread, axis=-1)} for thread in range(_THREADS)]
    answers = [candidate_answer(candidate, variant)[0] for variant in variants]
    end = time.perf_counter() + _BUDGET_S

    def work(thread: int) -> list[float]:
        errors: list[float] = []
        while len(errors) < _CALLS_PER_THREAD and (not errors or time.perf_counter() < end):
            errors.append(_again(candidate, variants[thread], answers[thread]))
        return errors

    with ThreadPoolExecutor(_THREADS) as executor:
        return [error for errors in executor.map(work, range(_THREADS)) for error in errors]


def _main(inputs: Arrays) -> tuple[str, NDArray[Any]]:
    """Return the name and the values of the main input, which comes first."""
    return next(iter(inputs.items()))


def _again(candidate: Model, inputs: Arrays, answer: Arrays) -> float:
    """Make a call again, and return how far its answer is from the one before."""
    again = candidate_answer(candidate, inputs)[0]
    if again.keys() != answer.keys():
        return float("nan")
    return float(np.max([_difference(answer[name], again[name]) for name in answer], initial=0.0))


def _difference(before: NDArray[Any], after: NDArray[Any]) -> float:
    if before.shape != after.shape:
        return float("nan")
    if np.array_equal(before, after, equal_nan=True):
        return 0.0
    peak = float(np.abs(before).max())
    return float(np.abs(np.asarray(before, np.float64) - after).max()) / peak if peak else float("inf")
