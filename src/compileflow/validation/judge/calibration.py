"""Calibration: how far the source model's own noise, or the grid of int8, moves the limit of a gate."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from compileflow.spec import Precision
from compileflow.validation.judge.suite import Gate, load_suite
from compileflow.validation.measure.measurements import Measurements


@dataclass(frozen=True)
class Calibration:
    """What moves the limit of one gate.

    Attributes:
        limit: Limit that replaces the gate's; None: it stays.
        reason: Why it is replaced; empty if it is not.
        floor: Floor of the gate, in the units of its value; None if it was not measured.
        openings: By output, the factor of the limit, where the noise of the outputs moves it.
        floors: By output, the noise.
    """

    limit: float | None = None
    reason: str = ""
    floor: float | None = None
    openings: dict[str, float] = field(default_factory=dict)
    floors: dict[str, float] = field(default_factory=dict)


def opened(gate: Gate, measurements: Measurements, precision: Precision, *, is_fixed: bool) -> Calibration:
    """Return what moves the limit of a gate.

    A limit moves only to the looser side, to a multiple of the floor, and never beyond what the suite allows.

    Args:
        gate: The gate.
        measurements: Measurements with the floors.
        precision: Precision of the compiled model.
        is_fixed: The target or the user has set the limit, so that nothing moves it.
    """
    suite = load_suite()
    entry, grid_limit = gate.entry, suite.grid_limits.get(gate.entry.gate)
    if entry.noise is not None:
        noise = entry.noise
        floors = {output: floor[noise] for output, floor in measurements.floors.items() if floor.get(noise)}
        largest = max(floors.values(), default=0.0)
        if is_fixed or precision not in suite.noise_limits.precisions or gate.limit <= 0.0 or not floors:
            return Calibration(floor=largest or None)
        openings = {
            output: float(np.clip(suite.noise_limits.factor * floor / gate.limit, 1.0, suite.noise_limits.most))
            for output, floor in floors.items()
        }
        if entry.table == "comparisons":
            return Calibration(openings=openings, floors=floors)
        share = max(openings.values())
        reason = f"limit raised from {gate.limit:.3g}: the source model's own noise is {largest:.2g}"
        return Calibration(gate.limit * share if share > 1.0 else None, reason if share > 1.0 else "", largest)
    value = measurements.grid.get(entry.source)
    if grid_limit is None or value is None:
        return Calibration()
    floor = value if entry.is_maximum else 1.0 - value
    usual = gate.limit if entry.is_maximum else 1.0 - gate.limit
    allowed = max(usual, min(grid_limit.factor * floor, grid_limit.most))
    if is_fixed or allowed <= usual:
        return Calibration(floor=floor)
    limit = allowed if entry.is_maximum else 1.0 - allowed
    reason = f"limit moved from {gate.limit:.3g}: rounding the source model to int8 alone gives {value:.3g}"
    return Calibration(limit, reason, floor)
