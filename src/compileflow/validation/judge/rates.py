"""Bounds for a rate that was measured on few examples, and how many examples would decide a gate."""

from __future__ import annotations


def rate_bounds(hits: int, trials: int) -> tuple[float, float]:
    """Return a lower and an upper bound for a rate, each of which holds with 95 % confidence.

    Both are one-sided Wilson bounds, so together they are a 90 % interval.
    Source: E. B. Wilson (1927), Journal of the American Statistical Association 22, 209-212.

    >>> rate_bounds(268, 268)[0] >= 0.99 > rate_bounds(267, 267)[0]
    True
    """
    from scipy.stats import binomtest

    if trials == 0:
        return 0.0, 1.0
    interval = binomtest(hits, trials).proportion_ci(confidence_level=0.9, method="wilson")
    return float(interval.low), float(interval.high)


def trials_to_decide(hits: int, trials: int, gate: float, limit: int = 1_000_000) -> int | None:
    """Return how many more trials at this rate would put the gate outside the bounds; None if none would."""
    rate = hits / trials
    low, high = trials, limit
    if not _decides(rate, limit, gate):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _decides(rate, middle, gate) else (middle + 1, high)
    return low - trials


def _decides(rate: float, trials: int, gate: float) -> bool:
    lower, upper = rate_bounds(round(rate * trials), trials)
    return lower >= gate or upper < gate
