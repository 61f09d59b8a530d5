"""Statistics of rates: bounds, tests, what the examples can show, and how many more would decide a gate."""

from __future__ import annotations

from collections.abc import Mapping

# Probability that a suite refuses a compiled model all of whose rates are at their limits.
FALSE_REFUSALS = 0.01


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


def chance_of_fewer(hits: int, trials: int, rate: float) -> float:
    """Return the probability of at most `hits` hits if the true rate is `rate`: the exact binomial test."""
    from scipy.stats import binomtest

    return float(binomtest(hits, trials, rate, alternative="less").pvalue) if trials else 1.0


def mcnemar_p(right_to_wrong: int, wrong_to_right: int) -> float:
    """Return the exact two-sided p value of McNemar's test: whether chance alone explains how the changes split.

    Source: Q. McNemar (1947), Psychometrika 12, 153-157, with the binomial distribution for few changes.
    """
    from scipy.stats import binomtest

    changes = right_to_wrong + wrong_to_right
    return float(binomtest(right_to_wrong, changes, 0.5).pvalue) if changes else 1.0


def smallest_loss(trials: int) -> float:
    """Return the smallest share of wrong decisions of which this many show at least one, with 95 % probability."""
    return float(1.0 - 0.05 ** (1.0 / trials)) if trials else 1.0


def holm_levels(p_values: Mapping[str, float], level: float = FALSE_REFUSALS) -> dict[str, float]:
    """Return the level at which each hypothesis is rejected, so that any false rejection has probability `level`.

    The smallest of n p values is compared with level / n, the next one with level / (n - 1), and so on. From the
    first that exceeds its level, none is rejected. Source: S. Holm (1979), Scandinavian Journal of Statistics 6,
    65-70.
    """
    levels: dict[str, float] = {}
    current, is_open = level, True
    for position, name in enumerate(sorted(p_values, key=lambda name: (p_values[name], name))):
        if is_open:
            current = level / (len(p_values) - position)
            is_open = p_values[name] <= current
        levels[name] = current
    return levels


def trials_to_decide(
    hits: int, trials: int, gate: float, limit: int = 1_000_000, *, level: float = 0.05
) -> int | None:
    """Return how many more trials at this rate would decide the gate; None if none would.

    Args:
        hits: Trials that agree.
        trials: All trials.
        gate: Limit of the rate.
        limit: Largest number of trials to consider.
        level: Level at which a rate below the limit is refused.
    """
    rate = hits / trials
    low, high = trials, limit
    if not _decides(rate, limit, gate, level):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _decides(rate, middle, gate, level) else (middle + 1, high)
    return low - trials


def _decides(rate: float, trials: int, gate: float, level: float) -> bool:
    hits = round(rate * trials)
    if rate_bounds(hits, trials)[0] >= gate:
        return True
    # Wilson's bound is the cheaper one, and the exact test is asked only where the bound leaves a doubt.
    return rate_bounds(hits, trials)[1] < gate and (level >= 0.05 or chance_of_fewer(hits, trials, gate) <= level)
