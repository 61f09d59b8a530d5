"""Calibration: how far the source model's own noise, or its number format, moves the limit of a gate."""

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
        floor: Floor of the gate, in the units of its value: what noise or rounding does; None if not measured.
        openings: By output, the factor of the limit, where the floors of the outputs move it.
        floors: By output, the floor.
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
        noise, noise_limit = entry.noise, suite.noise_limits.get(precision)
        if precision is Precision.FP32:
            by_output = measurements.floors
        elif entry.table == "comparisons":
            by_output = measurements.grid_floors
        else:
            by_output = {"": {noise: measurements.grid.get(entry.source, 0.0)}}
        floors = {output: floor[noise] for output, floor in by_output.items() if floor.get(noise)}
        largest = max(floors.values(), default=0.0)
        if is_fixed or noise_limit is None or gate.limit <= 0.0 or not floors:
            return Calibration(floor=largest or None)
        # 1 - cosine is half the square of rel_l2.
        power = 2 if noise == "one_minus_cosine" else 1
        factor, most = noise_limit.factor**power, noise_limit.most**power
        openings = {
            output: float(np.clip(factor * floor / gate.limit, 1.0, most)) for output, floor in floors.items()
        }
        if entry.table == "comparisons":
            return Calibration(openings=openings, floors=floors)
        share = max(openings.values())
        reason = f"limit raised from {gate.limit:.3g}: {cause(precision, f'{largest:.2g}')}"
        return Calibration(gate.limit * share if share > 1.0 else None, reason if share > 1.0 else "", largest)
    value = measurements.grid.get(entry.source)
    if grid_limit is None or precision not in grid_limit.precisions or value is None:
        return Calibration()
    floor = value if entry.is_maximum else 1.0 - value
    usual = gate.limit if entry.is_maximum else 1.0 - gate.limit
    allowed = max(usual, min(grid_limit.factor * floor, grid_limit.most))
    if is_fixed or allowed <= usual:
        return Calibration(floor=floor)
    limit = allowed if entry.is_maximum else 1.0 - allowed
    return Calibration(limit, f"limit moved from {gate.limit:.3g}: {cause(precision, f'{value:.3g}')}", floor)


def cause(precision: Precision, value: str, output: str = "") -> str:
    """Return a sentence about what moves a limit at a precision, and its value."""
    place = f" in {output}" if output else ""
    if precision is Precision.FP32:
        return f"the source model's own noise{place} is {value}"
    return f"rounding the source model to {precision.value} alone gives {value}{place}"
