"""Compare both models on every case: output by output, example by example."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from compileflow.contracts import Arrays, TensorRecord
from compileflow.errors import MeasurementError, first_line
from compileflow.spec import HfTask
from compileflow.validation.cases.case import Case
from compileflow.validation.measure import metrics
from compileflow.validation.measure.coverage import Coverage
from compileflow.validation.measure.decisions import Decisions
from compileflow.validation.measure.detections import in_same_order
from compileflow.validation.measure.measurements import Measurements, Model, candidate_answer
from compileflow.validation.measure.tendencies import SPECIAL_TOKEN_ERROR, Tendencies, worst_special_token

# Two answers of the source model that should be equal differ by less than this share of their norm.
_SAME = 1e-3


def measure(
    reference: Model,
    candidate: Model,
    *,
    outputs: Sequence[TensorRecord],
    decisions: Decisions,
    cases: Sequence[Case],
    coverage: Coverage,
    progress: Callable[[str], None],
    bucket_lengths: Collection[int] = (),
) -> Measurements:
    """Run both models on every case and compare their outputs and decisions.

    Args:
        reference: The source model.
        candidate: The compiled model.
        outputs: Records of the outputs.
        decisions: Collects the decisions on natural examples.
        cases: Inputs of both models.
        coverage: Counts the shapes and token ids of the cases.
        progress: Is told which case is compared.
        bucket_lengths: Lengths of the shape buckets; the compiled model pads all others. Empty: it pads none.

    Raises:
        MeasurementError: The source model fails or returns NaN or infinity, or natural examples are missing.
    """
    measurements = Measurements()
    tendencies = Tendencies()
    for number, case in enumerate(cases):
        if number % 10 == 0:
            progress(f"comparing case {number + 1} of {len(cases)}: {case.name}")
        if case.answers_only:
            measurements.comparisons += _faulty_answers(case, outputs, *candidate_answer(candidate, case.inputs))
            coverage.add(case)
            continue
        expected = _reference_answer(reference, case, measurements)
        if expected is None:
            continue
        actual, error_text = candidate_answer(candidate, case.inputs)
        coverage.add(case)
        if decisions.task is HfTask.OBJECT_DETECTION:
            actual = in_same_order(outputs, expected, actual)
        is_plain = case.is_plain(bucket_lengths)
        for record in outputs:
            rows = compared_rows(case, record, expected[record.name], actual.get(record.name), error_text)
            measurements.comparisons += [row | {"plain": int(is_plain)} for row in rows]
        if case.family == "agreement" and not error_text:
            decisions.add(case, expected, actual)
            tendencies.add(case, outputs, expected, actual)
    if not any(case.family == "agreement" for case in cases):
        raise MeasurementError(
            "The validation has no natural example.", hint="Give a file with one example per line."
        )
    metrics.relate_to_scale(measurements.comparisons, metrics.scales_of(measurements.comparisons))
    measurements.coverage = coverage.covered()
    measurements.scalars.update(coverage.scalars())
    measurements.rates.extend((*decisions.rates(), *decisions.scores.rates()))
    measurements.scalars.update(decisions.scalars() | decisions.scores.scalars())
    measurements.details.update(decisions.details())
    measurements.score = decisions.scores.result()
    if decisions.precision.is_integer:
        measurements.scalars.update(tendencies.scalars(measurements.comparisons))
        if worst := worst_special_token(measurements.comparisons):
            measurements.details[SPECIAL_TOKEN_ERROR] = f"the worst is {worst[0]}"
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


def compared_rows(
    case: Case, record: TensorRecord, expected: Any, actual: Any, error_text: str
) -> list[dict[str, Any]]:
    """Compare one output of a case, example by example.

    Args:
        case: Inputs of both models.
        record: Record of the output.
        expected: Output of the source model.
        actual: Output of the compiled model; None if it has not answered.
        error_text: Text of the compiled model's error.

    Raises:
        MeasurementError: The source model returns NaN or infinity.
    """
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


def _faulty_answers(
    case: Case, outputs: Sequence[TensorRecord], actual: Arrays, error_text: str
) -> list[dict[str, Any]]:
    """Return a row for each output that is missing or not finite, in a case whose numbers are not compared."""
    rows = []
    for record in outputs:
        answer = actual.get(record.name)
        if answer is None or not np.isfinite(answer).all():
            nothing = np.empty(0)
            row = metrics.compare(nothing, nothing if answer is None else answer)
            rows.append(
                {
                    "case": case.name,
                    "family": case.family,
                    "output": record.name,
                    "text": case.texts[0],
                    "trouble": error_text,
                    "plain": 0,
                }
                | row
                | {"shape_matches": int(answer is not None)}
            )
    return rows
