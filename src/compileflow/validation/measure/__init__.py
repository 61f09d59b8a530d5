"""Measure: numbers that compare the compiled model with its source model. Nothing here judges."""

from __future__ import annotations

from compileflow.validation.measure.compare_outputs import measure
from compileflow.validation.measure.coverage import Coverage
from compileflow.validation.measure.latency import OneThread, Stopwatch, measure_latency, time_pairs
from compileflow.validation.measure.measurements import Latency, Measurements, Model, candidate_answer
from compileflow.validation.measure.noise import measure_grid, measure_noise, rounded_to
from compileflow.validation.measure.probes import (
    measure_mask,
    measure_padding,
    measure_token_types,
)
from compileflow.validation.measure.repeatability import Call, measure_repeatability

__all__ = [
    "Call",
    "Coverage",
    "Latency",
    "Measurements",
    "Model",
    "OneThread",
    "Stopwatch",
    "candidate_answer",
    "measure",
    "measure_grid",
    "measure_latency",
    "measure_mask",
    "measure_noise",
    "measure_padding",
    "measure_repeatability",
    "measure_token_types",
    "rounded_to",
    "time_pairs",
]
