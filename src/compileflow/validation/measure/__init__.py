"""Measure: numbers that compare the compiled model with its source model. Nothing here judges."""

from __future__ import annotations

from compileflow.validation.measure.compare_outputs import measure
from compileflow.validation.measure.latency import measure_latency, time_pairs
from compileflow.validation.measure.measurements import Latency, Measurements, Model, candidate_answer
from compileflow.validation.measure.probes import (
    measure_mask,
    measure_noise,
    measure_padding,
    measure_token_types,
)

__all__ = [
    "Latency",
    "Measurements",
    "Model",
    "candidate_answer",
    "measure",
    "measure_latency",
    "measure_mask",
    "measure_noise",
    "measure_padding",
    "measure_token_types",
    "time_pairs",
]
