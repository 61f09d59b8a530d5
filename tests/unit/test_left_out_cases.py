"""Cases that do not suit the source model are left out of a validation, with a note; other failures end it."""

from __future__ import annotations

import numpy as np
import pytest

from compileflow.contracts import Arrays, ComponentRecord, TensorRecord
from compileflow.errors import MeasurementError
from compileflow.spec import HfTask
from compileflow.validation.cases import Case
from compileflow.validation.measure import Coverage, Measurements, measure
from compileflow.validation.measure.decisions import Decisions

OUTPUTS = (TensorRecord(name="last_hidden_state", dtype="float32", axes=("batch", "sequence", 2)),)
RECORD = ComponentRecord(
    folder="components/default",
    inputs=(TensorRecord(name="input_ids", dtype="int64", axes=("batch", "sequence")),),
    outputs=OUTPUTS,
    output_class="module:Class",
    max_sequence_length=3,
    dynamic_axes=True,
)
IDS = np.array([[1, 2, 3]])
FULL = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), "token_type_ids": np.zeros_like(IDS)}


def model(inputs: Arrays) -> Arrays:
    """Answer with the ids; it needs its mask, and shifts the answer if it gets no token types."""
    if "attention_mask" not in inputs:
        raise AttributeError("'NoneType' object has no attribute 'unsqueeze'")
    shift = 0.0 if "token_type_ids" in inputs else 5.0
    return {"last_hidden_state": np.stack([inputs["input_ids"] + shift] * 2, axis=-1).astype(np.float32)}


def measured(*cases: Case) -> Measurements:
    natural = Case("natural", "agreement", ("text",), FULL, FULL["attention_mask"])
    decisions = Decisions(HfTask.FEATURE_EXTRACTION, labels={}, multi_label=False)
    return measure(
        model,
        model,
        outputs=OUTPUTS,
        decisions=decisions,
        cases=[natural, *cases],
        coverage=Coverage(RECORD, shapes=(), tokens=None),
        progress=lambda _: None,
    )


def without(name: str, *, may_fail: bool) -> Case:
    inputs = {key: value for key, value in FULL.items() if key != name}
    return Case(
        f"without {name}",
        "inputs",
        ("text",),
        inputs,
        FULL["attention_mask"],
        may_fail=may_fail,
        same_as=FULL if may_fail else None,
    )


def test_case_that_the_source_model_refuses_is_left_out_with_a_note() -> None:
    measurements = measured(without("attention_mask", may_fail=True))

    assert {row["case"] for row in measurements.comparisons} == {"natural"}
    assert measurements.notes == [
        "The case 'without attention_mask' was left out: the source model fails on it (AttributeError: 'NoneType' "
        "object has no attribute 'unsqueeze')."
    ]


def test_case_that_the_source_model_answers_otherwise_is_left_out_with_a_note() -> None:
    measurements = measured(without("token_type_ids", may_fail=True))

    assert {row["case"] for row in measurements.comparisons} == {"natural"}
    assert len(measurements.notes) == 1
    assert "does not replace a missing input by neutral values" in measurements.notes[0]


def test_source_model_that_fails_on_a_required_case_ends_the_validation() -> None:
    with pytest.raises(MeasurementError, match="source model itself fails on the case 'without attention_mask'"):
        measured(without("attention_mask", may_fail=False))
