"""Latency: both models timed in turn, so that a slow moment of the machine affects both."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from compileflow.contracts import Arrays
from compileflow.validation.measure.measurements import Latency, Measurements, Model, candidate_answer

_RESAMPLES, _SEED = 2000, 7
_BUDGET_S = 4.0


def measure_latency(
    measurements: Measurements,
    reference: Model,
    candidate: Model,
    timed: Callable[[int, int], Arrays],
    *,
    shapes: Sequence[tuple[int, int]],
    pairs: int,
) -> None:
    """Time both models at each shape, (batch size, length). A shape that the candidate refuses becomes a note."""
    for batch_size, length in shapes:
        inputs = timed(batch_size, length)
        # The examples may be shorter than the requested length.
        shape = f"{batch_size} x {inputs['input_ids'].shape[1] if 'input_ids' in inputs else length}"
        error_text = candidate_answer(candidate, inputs)[1]
        if error_text:
            measurements.notes.append(f"{shape} was not timed: {error_text}")
            continue
        measurements.latencies.append(
            time_pairs(
                shape, partial(reference, inputs), partial(candidate, inputs), pairs=pairs, budget_s=_BUDGET_S
            )
        )
    if measurements.latencies:
        measurements.scalars["latency_ratio"] = measurements.latencies[0].ratio


def time_pairs(
    shape: str,
    reference: Callable[[], object],
    candidate: Callable[[], object],
    *,
    pairs: int,
    budget_s: float,
) -> Latency:
    """Call both models in turn, after three warm-up calls of each.

    The interval is the percentile bootstrap of the median ratio (B. Efron, 1979, Annals of Statistics 7, 1-26).

    Args:
        shape: Name of the shape that is timed.
        reference: Function that calls the source model once.
        candidate: Function that calls the compiled model once.
        pairs: Number of pairs to time.
        budget_s: Seconds after which fewer pairs are enough; at least 5 are always timed.
    """
    from scipy.stats import bootstrap

    for _ in range(3):
        reference()
        candidate()
    times: list[tuple[float, float]] = []
    end = time.perf_counter() + budget_s
    while len(times) < pairs and (len(times) < 5 or time.perf_counter() < end):
        # The second call finds warm caches, so the order changes with every pair.
        first_model, second_model = (reference, candidate) if len(times) % 2 == 0 else (candidate, reference)
        first_s, second_s = _seconds(first_model), _seconds(second_model)
        times.append((first_s, second_s) if len(times) % 2 == 0 else (second_s, first_s))
    values = np.asarray(times)
    ratios = values[:, 1] / values[:, 0]
    interval = bootstrap(
        (ratios,), np.median, n_resamples=_RESAMPLES, method="percentile", rng=np.random.default_rng(_SEED)
    ).confidence_interval
    return Latency(
        shape=shape,
        reference_p50_ms=float(np.median(values[:, 0]) * 1e3),
        candidate_p50_ms=float(np.median(values[:, 1]) * 1e3),
        ratio=float(np.median(ratios)),
        ratio_low=float(interval.low),
        ratio_high=float(interval.high),
        pairs=len(times),
    )


def _seconds(call: Callable[[], object]) -> float:
    # Two untimed calls first: the other model's threads keep spinning for a while after its call.
    call()
    call()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
