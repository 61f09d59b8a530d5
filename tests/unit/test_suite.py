"""The suite file: its gates and limits, and that no entry can vanish unseen."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from compileflow.errors import MeasurementError
from compileflow.spec import GRAPH_TASKS, HfTask, Precision
from compileflow.validation.judge import judge, suite
from compileflow.validation.judge.suite import SuiteFile, gates_for, load_suite
from compileflow.validation.measure import Measurements

FP32, BF16, FP16, INT8, INT4 = tuple(Precision)
# The agreed limits, written out a second time on purpose.
NUMERIC = {
    "rel_l2": {FP32: 1e-4, FP16: 1e-2, BF16: 5e-2},
    "one_minus_cosine": {FP32: 1e-6, FP16: 1e-4, BF16: 1e-3},
}
# Logits are compared in their own units; hidden states, boxes and depths, which may have any, as a share.
SCALED = (
    HfTask.IMAGE_FEATURE_EXTRACTION,
    HfTask.IMAGE_SEGMENTATION,
    HfTask.OBJECT_DETECTION,
    HfTask.DEPTH_ESTIMATION,
    HfTask.AUDIO_XVECTOR,
    HfTask.ZERO_SHOT_IMAGE_CLASSIFICATION,
)
BY_TASK = {
    HfTask.TEXT_CLASSIFICATION: {
        "label_agreement": {FP32: 1.0, FP16: 0.99, BF16: 0.99, INT8: 0.98},
        "order_agreement": {FP32: 0.999, FP16: 0.99, BF16: 0.98, INT8: 0.95},
    },
    HfTask.TOKEN_CLASSIFICATION: {
        "label_agreement": {FP32: 0.999, FP16: 0.995, BF16: 0.995, INT8: 0.98},
        "entity_f1": {FP32: 0.99, FP16: 0.99, BF16: 0.99, INT8: 0.97},
    },
    HfTask.FEATURE_EXTRACTION: {
        "embedding_error": {FP32: 1e-4, FP16: 1e-2, BF16: 5e-2},
        "neighbour_overlap": {FP32: 0.99, FP16: 0.99, BF16: 0.99, INT8: 0.95},
    },
    HfTask.FILL_MASK: {"top5_overlap": {FP32: 0.99, FP16: 0.95, BF16: 0.95, INT8: 0.9}},
    HfTask.TEXT_GENERATION: {
        "cached_reading": {FP32: 1e-4, FP16: 1e-2, BF16: 5e-2, INT8: 0.5, INT4: 0.5},
        "next_token": {FP32: 1.0, FP16: 0.99, BF16: 0.98, INT8: 0.95, INT4: 0.85},
        "kl_mean": {FP32: 1e-5, FP16: 1e-3, BF16: 1e-2, INT8: 3e-2, INT4: 0.15},
        "perplexity_change": {FP32: 1e-3, FP16: 5e-3, BF16: 5e-3, INT8: 1e-2, INT4: 5e-2},
    },
    HfTask.QUESTION_ANSWERING: {"exact_span": {FP32: 0.99, FP16: 0.99, BF16: 0.99}},
    HfTask.MULTIPLE_CHOICE: {"order_agreement": {FP32: 0.999, FP16: 0.99, BF16: 0.98, INT8: 0.95}},
    HfTask.IMAGE_CLASSIFICATION: {"label_agreement": {FP32: 1.0, FP16: 0.99, BF16: 0.99, INT8: 0.98}},
    HfTask.AUDIO_CLASSIFICATION: {"label_agreement": {FP32: 1.0, FP16: 0.99, BF16: 0.99, INT8: 0.98}},
    HfTask.ZERO_SHOT_IMAGE_CLASSIFICATION: {"label_agreement": {FP32: 1.0, FP16: 0.99, BF16: 0.99, INT8: 0.98}},
    HfTask.IMAGE_FEATURE_EXTRACTION: {"neighbour_overlap": {FP32: 0.99, FP16: 0.99, BF16: 0.99, INT8: 0.95}},
    HfTask.IMAGE_SEGMENTATION: {
        "label_agreement": {FP32: 0.999, FP16: 0.99, BF16: 0.98, INT8: 0.95},
        "mean_iou": {FP32: 0.99, FP16: 0.95, BF16: 0.95, INT8: 0.9},
    },
    HfTask.OBJECT_DETECTION: {"box_agreement": {FP32: 0.99, FP16: 0.95, BF16: 0.95, INT8: 0.9}},
    HfTask.DEPTH_ESTIMATION: {"depth_agreement": {FP32: 0.999, FP16: 0.99, BF16: 0.98, INT8: 0.9}},
    HfTask.AUDIO_FRAME_CLASSIFICATION: {"label_agreement": {FP32: 0.999, FP16: 0.995, BF16: 0.995, INT8: 0.98}},
    HfTask.AUDIO_XVECTOR: {"neighbour_overlap": {FP32: 0.99, FP16: 0.99, BF16: 0.99, INT8: 0.95}},
    HfTask.SPEECH_RECOGNITION: {
        "label_agreement": {FP32: 0.999, FP16: 0.995, BF16: 0.995, INT8: 0.98},
        "exact_transcript": {FP32: 1.0, FP16: 0.9, BF16: 0.9, INT8: 0.8},
    },
}
CLASSIFIES = (
    HfTask.TEXT_CLASSIFICATION,
    HfTask.TOKEN_CLASSIFICATION,
    HfTask.IMAGE_CLASSIFICATION,
    HfTask.AUDIO_CLASSIFICATION,
    HfTask.AUDIO_FRAME_CLASSIFICATION,
    HfTask.ZERO_SHOT_IMAGE_CLASSIFICATION,
)
# Their labels have places, but they decide about too many pixels or boxes for a limit of no flip.
LABELS_PLACES = (HfTask.IMAGE_SEGMENTATION, HfTask.OBJECT_DETECTION)
# Only text generation has int4.
EVERY = [pair for pair in product(Precision, GRAPH_TASKS) if pair[0] is not INT4 or pair[1].generates]
# Position of the first gate that is judged for all models.
FINITE_OUTPUTS = [entry.gate for entry in load_suite().gates].index("finite_outputs")


@pytest.mark.parametrize(("precision", "task"), EVERY)
def test_every_precision_and_task_has_the_gates_that_hold_for_all(precision: Precision, task: HfTask) -> None:
    gates = {gate.entry.gate: gate for gate in gates_for(precision, task, {})}
    required = [name for name, gate in gates.items() if set(gate.entry.optional) != set(GRAPH_TASKS)]
    assert required[:2] == ["finite_outputs", "output_shapes"]
    assert gates["finite_outputs"].limit == 0
    assert gates["output_shapes"].limit == 1
    assert {"mask_respected", "rel_l2", "one_minus_cosine"} <= set(gates)
    assert ("token_types_respected" in gates) is (task.modality == "text" and not task.generates)
    assert ("label_order" in gates) is (task in CLASSIFIES + LABELS_PLACES)
    assert ("confident_flips" in gates) is (task in CLASSIFIES)
    assert ("max_abs_diff" in gates) is (precision is FP32 and task not in SCALED)
    assert ("peak_error" in gates) is (precision is FP32 and task in SCALED)


@pytest.mark.parametrize(("precision", "task"), EVERY)
def test_limits_are_the_agreed_ones(precision: Precision, task: HfTask) -> None:
    gates = {gate.entry.gate: gate for gate in gates_for(precision, task, {})}
    largest = {"peak_error": {FP32: 1e-3}} if task in SCALED else {"max_abs_diff": {FP32: 1e-4}}
    for name, limits in (NUMERIC | largest | BY_TASK[task]).items():
        if precision in limits:
            assert gates[name].limit == limits[precision], name


@pytest.mark.parametrize(("precision", "task"), EVERY)
def test_every_task_has_a_decision_gate(precision: Precision, task: HfTask) -> None:
    decisions = [gate for gate in gates_for(precision, task, {}) if gate.entry.table == "rates"]
    assert set(BY_TASK[task]) <= {gate.entry.gate for gate in gates_for(precision, task, {})}
    assert decisions


@pytest.mark.parametrize(("precision", "task"), EVERY)
def test_only_the_numbers_of_int8_registered_predictions_and_the_light_path_warn(
    precision: Precision, task: HfTask
) -> None:
    warning = {gate.entry.gate for gate in gates_for(precision, task, {}) if gate.severity == "warning"}
    numbers = {
        "mask_respected",
        "rel_l2",
        "one_minus_cosine",
        "embedding_error",
        "neighbour_overlap",
        "cached_reading",
    }
    gates = {gate.entry.gate for gate in gates_for(precision, task, {})}
    others = {"greedy", "light_token_ids", "light_answers"} & gates
    assert warning == {"registered_predictions"} | others | (numbers & gates if precision.is_integer else set())


def test_a_tasks_own_limit_wins() -> None:
    def limit(task: HfTask) -> float:
        return next(gate.limit for gate in gates_for(FP32, task, {}) if gate.entry.gate == "label_agreement")

    assert limit(HfTask.TEXT_CLASSIFICATION) == limit(HfTask.FILL_MASK) == 1.0
    assert limit(HfTask.TOKEN_CLASSIFICATION) == 0.999


def test_overrides_win_over_tasks_and_precisions() -> None:
    gates = {
        gate.entry.gate: gate.limit
        for gate in gates_for(FP32, HfTask.TOKEN_CLASSIFICATION, {"label_agreement": 0.9, "rel_l2": 0.02})
    }
    assert gates["label_agreement"] == 0.9
    # Both gates read the limit rel_l2.
    assert gates["rel_l2"] == gates["mask_respected"] == 0.02
    assert gates["max_abs_diff"] == 1e-4


def test_an_override_of_zero_is_a_limit() -> None:
    gates = {gate.entry.gate: gate.limit for gate in gates_for(FP32, HfTask.FILL_MASK, {"rel_l2": 0.0})}
    assert gates["rel_l2"] == 0.0


def test_latency_is_judged_only_when_asked() -> None:
    names = [gate.entry.gate for gate in gates_for(FP32, HfTask.FILL_MASK, {})]
    assert "latency_ratio" not in names
    with_limit = [gate.entry.gate for gate in gates_for(FP32, HfTask.FILL_MASK, {"latency_ratio": 0.9})]
    assert with_limit == [*names, "latency_ratio"]


def _body() -> dict[str, Any]:
    return copy.deepcopy(load_suite().model_dump(mode="json"))


def _use(monkeypatch: pytest.MonkeyPatch, body: dict[str, Any]) -> None:
    """Replace the library's suite file."""
    monkeypatch.setattr(suite, "_body", lambda: yaml.safe_dump(body).encode())
    load_suite.cache_clear()
    monkeypatch.setattr(suite, "load_suite", load_suite.__wrapped__)


def _set(path: str, value: Any) -> dict[str, Any]:
    body = _body()
    *parents, last = path.split(".")
    place = body
    for name in parents:
        place = place[int(name)] if isinstance(place, list) else place[name]
    place[last] = value
    return body


def test_the_shipped_file_is_accepted() -> None:
    assert SuiteFile.model_validate(_body()) == load_suite()


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("gates.0.severity", "fatal", "severity"),
        ("gates.0.table", "nowhere", "table"),
        ("gates.0.tasks", ["no-such-task"], "tasks"),
        ("gates.0.limit", "nothin", "no nothin"),
        ("limits.nothin", {"fp32": 0}, "no gate uses nothin"),
        ("limits.rel_l2", {"fp12": 0}, "fp12"),
        ("task_limits.token-classification.label_agreemint", {"fp32": 1}, "no gate uses label_agreemint"),
        ("warnings.int8", ["rel_l3"], "names unknown gates: rel_l3"),
        ("gates.1.gate", "finite_outputs", "share a name"),
        ("gates", [], "gates"),
        ("schema_version", 2, "schema_version"),
    ],
)
def test_an_unknown_entry_is_refused(path: str, value: Any, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        SuiteFile.model_validate(_set(path, value))


def test_an_unknown_type_is_refused_when_judging_not_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, _set(f"gates.{FINITE_OUTPUTS}.type", "expect_column_to_be_nice"))
    with pytest.raises(MeasurementError, match="unknown type 'expect_column_to_be_nice'") as caught:
        judge(Measurements(), precision=FP32, hf_task=HfTask.FILL_MASK)
    assert "expect_column_maximum_to_be_at_most" in str(caught.value.hint)


def test_types_of_great_expectations_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # Great Expectations knows this one, and it skips NaN.
    _use(monkeypatch, _set(f"gates.{FINITE_OUTPUTS}.type", "expect_column_values_to_be_between"))
    with pytest.raises(MeasurementError, match="unknown type"):
        judge(Measurements(), precision=FP32, hf_task=HfTask.FILL_MASK)


def test_no_gate_for_a_task_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    body = _body()
    for entry in body["gates"]:
        entry["tasks"] = ["text-classification"]
    _use(monkeypatch, body)
    with pytest.raises(MeasurementError, match="no gate for fp32 fill-mask"):
        gates_for(FP32, HfTask.FILL_MASK, {})
    assert gates_for(FP32, HfTask.TEXT_CLASSIFICATION, {})


def test_a_partial_task_limit_leaves_the_other_precisions_their_gate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _use(monkeypatch, _set("task_limits.token-classification.label_agreement", {"fp32": 0.5}))
    for precision, limit in ((FP32, 0.5), (INT8, 0.98)):
        gates = {gate.entry.gate: gate for gate in gates_for(precision, HfTask.TOKEN_CLASSIFICATION, {})}
        assert gates["label_agreement"].limit == limit
