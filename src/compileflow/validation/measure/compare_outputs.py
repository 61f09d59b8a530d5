"""Compare both models on every case: output by output, example by example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from compileflow.contracts import Arrays, TensorRecord
from compileflow.errors import MeasurementError, first_line
from compileflow.spec import HfTask
from compileflow.validation.cases.case import Case
from compileflow.validation.measure import metrics
from compileflow.validation.measure.decisions import Decisions
from compileflow.validation.measure.detections import in_same_order
from compileflow.validation.measure.measurements import Measurements, Model, candidate_answer

# Two answers of the source model that should be equal differ by less than this share of their norm.
_SAME = 1e-3


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
        expected = _reference_answer(reference, case, measurements)
        if expected is None:
            continue
        actual, error_text = candidate_answer(candidate, case.inputs)
        if decisions.task is HfTask.OBJECT_DETECTION:
            actual = in_same_order(outputs, expected, actual)
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


def _reference_answer(reference: Model, case: Case, measurements: Measurements) -> Arrays | None:
    """Return the source model's answer; None, with a note, for a case that does not suit the model."""
    try:
        answer = reference(case.inputs)
        equivalent = reference(case.same_as) if case.same_as is not None else answer
    except MemoryError:
        raise
    except Exception as error:
        if case.may_fail:
            measurements.notes.append(
                f"The case {case.name!r} was left out: the source model fails on it "
                f"({type(error).__name__}: {first_line(error)})."
            )
            return None
        raise MeasurementError(
            f"The source model itself fails on the case {case.name!r}: {error}",
            hint="Check that the model and its tokenizer belong together.",
        ) from error
    if any(metrics.rel_l2(equivalent[name], answer[name]) > _SAME for name in answer):
        measurements.notes.append(
            f"The case {case.name!r} was left out: the source model does not replace a missing input by neutral "
            "values, as the compiled model does. Pass all inputs."
        )
        return None
    return answer


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
    # An output without a batch axis, such as the scores of one image for all texts, is compared as a whole.
    indices = range(len(case.texts)) if record.axes[0] == "batch" else [...]
    for index, text in zip(indices, case.texts, strict=False):
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
