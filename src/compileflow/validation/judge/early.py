"""An early verdict: what the gates must say about an artifact, as far as its answers to natural examples show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from compileflow.spec import HfTask, Precision
from compileflow.validation.judge.rates import FALSE_REFUSALS, chance_of_fewer
from compileflow.validation.judge.suite import Gate, gates_for, load_suite
from compileflow.validation.measure.measurements import Measurements

EarlyOutcome = Literal["", "warn", "fail"]


def early_verdict(
    measurements: Measurements,
    *,
    precision: Precision,
    hf_task: HfTask,
    overrides: Mapping[str, float] | None = None,
    strict: bool = False,
) -> tuple[EarlyOutcome, str]:
    """Return the verdict that a whole validation cannot improve, and the reason; "" if it may still pass.

    Only gates count whose numbers the natural examples decide: NaN, the shapes of the answers, and the rates of
    equal decisions. Each limit is the loosest one to which the source model's noise can move it.

    Args:
        measurements: Comparisons and rates on the natural examples of a validation.
        precision: Precision of the compiled model.
        hf_task: Task of the compiled model.
        overrides: Value of each limit that the target or the user sets.
        strict: As for `judge`.
    """
    gates = gates_for(precision, hf_task, overrides or {}, strict=strict)
    rate_count = sum(gate.entry.table == "rates" for gate in gates)
    outcome: EarlyOutcome = ""
    reason = ""
    for gate in gates:
        if outcome == "fail" or (outcome and gate.severity == "warning"):
            continue
        is_fixed = gate.entry.limit in (overrides or {}) or (strict and gate.entry.table == "rates")
        limit = gate.limit if is_fixed else _loosest_limit(gate, precision)
        measured = _missed(gate, limit, measurements, FALSE_REFUSALS / max(1, rate_count))
        if measured is not None:
            outcome = "warn" if gate.severity == "warning" else "fail"
            side = "at most" if gate.entry.is_maximum else "at least"
            reason = f"{outcome}: {gate.entry.gate} measured {measured:.4g}, the limit is {side} {limit:.4g}"
    return outcome, reason


def _loosest_limit(gate: Gate, precision: Precision) -> float:
    """Return the limit of a rate if rounding the source model moves it as far as the suite allows."""
    grid_limit = load_suite().grid_limits.get(gate.entry.gate)
    if gate.entry.table != "rates" or grid_limit is None or precision not in grid_limit.precisions:
        return gate.limit
    return min(gate.limit, 1.0 - grid_limit.most)


def _missed(gate: Gate, limit: float, measurements: Measurements, level: float) -> float | None:
    """Return what a gate measures if it is beyond the limit; None if it is not, or if that is not decided yet."""
    entry = gate.entry
    if entry.table == "rates":
        rows = [row for row in measurements.rates if row["metric"] == entry.metric]
        hits, trials = (sum(row[name] for row in rows) for name in ("hits", "trials"))
        is_missed = hits < trials if limit >= 1.0 else chance_of_fewer(hits, trials, max(limit, 0.0)) <= level
        return hits / trials if trials and is_missed else None
    if entry.table != "comparisons" or entry.noise is not None:
        return None
    rows = [row for row in measurements.comparisons if entry.output in (None, row["output"])]
    if not rows:
        return None
    values = np.asarray([row[entry.column] for row in rows], dtype=float)
    worst = float(values.max() if entry.is_maximum else values.min())
    is_held = worst <= limit if entry.is_maximum else worst >= limit
    return None if is_held else worst
