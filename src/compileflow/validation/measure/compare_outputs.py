"""Compare both models on every case: output by output, example by example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from compileflow.contracts import Arrays, TensorRecord
from compileflow.errors import MeasurementError
from compileflow.validation.cases.case import Case
from compileflow.validation.measure import metrics
from compileflow.validation.measure.decisions import Decisions
from compileflow.validation.measure.measurements import Measurements, Model, candidate_answer


def measure(
    reference: Model,
    candidate: Model,
    *,
    outputs: Sequence[TensorRecord],
    decisions: Decisions,
    cases: Sequence[Case],
    progress: Callable[[str], None],
) -> Measurements:
    """Run both models on every case and compare their outputs and decisions.

    Raises:
        MeasurementError: The source model fails or returns NaN or infinity, or natural examples are missing.
    """
    measurements = Measurements()
    for number, case in enumerate(cases):
        if number % 10 == 0:
            progress(f"comparing case {number + 1} of {len(cases)}: {case.name}")
        expected = _reference_answer(reference, case)
        actual, error_text = candidate_answer(candidate, case.inputs)
        for record in outputs:
            measurements.comparisons += _compared_rows(
                case, record, expected[record.name], actual.get(record.name), error_text
            )
        if case.family == "agreement" and not error_text:
            decisions.add(case, expected, actual)
    if not any(case.family == "agreement" for case in cases):
        raise MeasurementError(
            "The validation has no natural example.", hint="Give a file with one example per line."
        )
    measurements.rates.extend(decisions.rates())
    measurements.scalars.update(decisions.scalars())
    return measurements


def _reference_answer(reference: Model, case: Case) -> Arrays:
    try:
        return reference(case.inputs)
    except (RuntimeError, ValueError, IndexError) as error:
        raise MeasurementError(
            f"The source model itself fails on the case {case.name!r}: {error}",
            hint="Check that the model and its tokenizer belong together.",
        ) from error


def _compared_rows(
    case: Case, record: TensorRecord, expected: Any, actual: Any, error_text: str
) -> list[dict[str, Any]]:
    mask = case.mask.astype(bool)
    per_token = record.axes[:2] in (("batch", "sequence"), ("batch", "frames"))
    if not np.isfinite(expected[mask] if per_token else expected).all():
        raise MeasurementError(
            f"The source model itself returns NaN or infinity on the case {case.name!r}.",
            hint="Correct the source model first.",
        )
    rows = []
    for index, text in enumerate(case.texts):
        before = expected[index][mask[index]] if per_token else expected[index]
        if actual is None or actual.shape != expected.shape:
            after = np.empty(0)
        else:
            after = actual[index][mask[index]] if per_token else actual[index]
        rows.append(
            {
                "case": case.name,
                "family": case.family,
                "output": record.name,
                "text": text[:200],
                "trouble": error_text,
            }
            | metrics.compare(before, after)
        )
    return rows
