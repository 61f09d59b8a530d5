"""Time two functions against each other, interleaved, so that a slow second hits both."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Latency:
    """Paired timings at one input shape.

    Attributes:
        shape: "batch x tokens".
        reference_p50_ms: Median of the source model, milliseconds.
        candidate_p50_ms: Median of the compiled model, milliseconds.
        ratio: Median of candidate / reference, pair by pair; below 1 the compiled model is faster.
        ratio_low: Lower end of its 95 % bootstrap interval.
        ratio_high: Upper end.
        pairs: Number of pairs.
    """

    shape: str
    reference_p50_ms: float
    candidate_p50_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    pairs: int


def time_pairs(
    shape: str,
    reference: Callable[[], object],
    candidate: Callable[[], object],
    *,
    pairs: int,
    budget_s: float,
) -> Latency:
    """Call both in turn, after three warm-up calls each.

    Args:
        shape: Name of what is timed.
        reference: Calls the source model once.
        candidate: Calls the compiled model once.
        pairs: Pairs wanted.
        budget_s: Seconds after which fewer do, but never fewer than 5.
    """
    for _ in range(3):
        reference()
        candidate()
    times: list[tuple[float, float]] = []
    end = time.perf_counter() + budget_s
    while len(times) < pairs and (len(times) < 5 or time.perf_counter() < end):
        # Who goes first changes every time: the second finds warm caches.
        first, second = (reference, candidate) if len(times) % 2 == 0 else (candidate, reference)
        a, b = _seconds(first), _seconds(second)
        times.append((a, b) if len(times) % 2 == 0 else (b, a))
    values = np.asarray(times)
    ratios = values[:, 1] / values[:, 0]
    random = np.random.default_rng(7)
    medians = np.median(random.choice(ratios, (2000, len(ratios))), axis=1)
    low, high = np.quantile(medians, (0.025, 0.975))
    return Latency(
        shape=shape,
        reference_p50_ms=float(np.median(values[:, 0]) * 1e3),
        candidate_p50_ms=float(np.median(values[:, 1]) * 1e3),
        ratio=float(np.median(ratios)),
        ratio_low=float(low),
        ratio_high=float(high),
        pairs=len(times),
    )


def _seconds(call: Callable[[], object]) -> float:
    # Twice untimed: the other model's threads spin on for a while after their call, and would be in the way.
    call()
    call()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
