"""Measure: numbers that compare the compiled model with its source model. Nothing here judges."""

from __future__ import annotations

from compileflow.validation.measure.outputs import (
    Measurements,
    Model,
    candidate_answer,
    measure,
    measure_latency,
    measure_mask,
    measure_noise,
    measure_padding,
    measure_token_types,
)

__all__ = [
    "Measurements",
    "Model",
    "candidate_answer",
    "measure",
    "measure_latency",
    "measure_mask",
    "measure_noise",
    "measure_padding",
    "measure_token_types",
]
