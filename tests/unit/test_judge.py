"""Synthetic measurements in, verdicts out, through the real Great Expectations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from compileflow.errors import MeasurementError
from compileflow.spec import HfTask, Precision
from compileflow.validation.judge import GateResult, Verdict, judge
from compileflow.validation.judge import verdict as judging
from compileflow.validation.measure import Measurements
from compileflow.validation.measure.metrics import compare

CLASSIFY, TAG, EMBED = HfTask.TEXT_CLASSIFICATION, HfTask.TOKEN_CLASSIFICATION, HfTask.FEATURE_EXTRACTION
NAN = float("nan")


def comparison(candidate: list[float] | None = None) -> dict[str, Any]:
    """Return one row as `measure` builds it."""
    row = {"case": "natural 1", "family": "agreement", "output": "logits", "text": "a text", "trouble": ""}
    return row | compare(np.array([1.0, -1.0]), np.array([1.0, -1.0] if candidate is None else candidate))


def healthy(hits: int = 300, trials: int = 300) -> Measurements:
    """Return the measurements of a faultless text classifier."""
    return Measurements(
        comparisons=[comparison() for _ in range(3)],
        rates=[
            {"metric": "label_agreement", "text": "", "hits": int(number < hits), "trials": 1}
            for number in range(trials)
        ],
        scalars={
            "misplaced_labels": 0.0,
            "confident_flips": 0.0,
            "mask_leak": 0.0,
            "token_type_error": 0.0,
            "latency_ratio": 2.5,
        },
    )


def verdict(
    measured: Measurements, task: HfTask = CLASSIFY, precision: Precision = Precision.FP32, **overrides: float
) -> Verdict:
    return judge(measured, precision=precision, hf_task=task, overrides=overrides)


def gate(answer: Verdict, name: str) -> GateResult:
    return next(result for result in answer.gates if result.gate == name)


def test_no_difference_passes() -> None:
    answer = verdict(healthy())
    assert answer.outcome == "pass"
    assert answer.reason == "pass: all 10 gates hold"
    assert len(answer.gates) == 10
    assert {result.outcome for result in answer.gates} == {"pass"}


def test_gates_come_in_the_suites_order() -> None:
    names = [result.gate for result in verdict(healthy(), latency_ratio=9.0).gates]
    assert names[:3] == ["finite_outputs", "output_shapes", "label_order"]
    assert names[-1] == "latency_ratio"


@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_one_value_that_is_not_finite_fails_first_whatever_the_precision(bad: float) -> None:
    for precision in Precision:
        measured = healthy()
        measured.comparisons[1] = comparison([1.0, bad])
        answer = verdict(measured, precision=precision)
        assert answer.outcome == "fail"
        assert answer.reason.startswith("fail: finite_outputs measured 1, the limit is at most 0")
        assert gate(answer, "rel_l2").measured is None
        assert gate(answer, "rel_l2").outcome in ("fail", "warn")


def test_wrong_shape_fails() -> None:
    measured = healthy()
    measured.comparisons.append(comparison([1.0]))
    assert verdict(measured).reason.startswith("fail: output_shapes")


def test_nan_scalar_fails() -> None:
    measured = healthy()
    measured.scalars["mask_leak"] = NAN
    answer = verdict(measured)
    assert answer.outcome == "fail"
    assert "mask_respected measured no number" in answer.reason


@pytest.mark.parametrize("metric", ["misplaced_labels", "mask_leak", "confident_flips"])
def test_a_metric_that_was_not_measured_is_an_error(metric: str) -> None:
    measured = healthy()
    del measured.scalars[metric]
    answer = verdict(measured)
    assert answer.outcome == "error"
    assert "no rows to judge" in answer.reason


def test_no_rate_is_an_error() -> None:
    measured = healthy()
    measured.rates.clear()
    answer = verdict(measured)
    assert answer.outcome == "error"
    assert answer.reason.startswith("error: label_agreement measured no number")


def test_zero_trials_are_an_error() -> None:
    assert verdict(healthy(hits=0, trials=0)).outcome == "error"


def test_nothing_measured_at_all_is_an_error_in_every_gate() -> None:
    answer = verdict(Measurements())
    assert answer.outcome == "error"
    assert {result.outcome for result in answer.gates} == {"error"}
    assert answer.reason.startswith("error: finite_outputs")


def test_an_optional_gate_that_does_not_apply_is_noted_and_not_judged() -> None:
    measured = healthy()
    del measured.scalars["token_type_error"]
    answer = verdict(measured)
    assert answer.outcome == "pass"
    assert "token_types_respected" not in [result.gate for result in answer.gates]
    assert "token_types_respected does not apply to this model." in answer.notes


def test_too_few_examples_warn_and_say_how_many_more_decide() -> None:
    answer = verdict(healthy(hits=20, trials=20), precision=Precision.FP16)
    assert answer.outcome == "warn"
    result = gate(answer, "label_agreement")
    assert result.outcome == "warn"
    assert result.severity == "critical"
    assert "20 of 20" in result.detail
    assert "248 more examples" in answer.reason
    # With ten decisions per example, a tenth of the examples is enough.
    measured = healthy()
    measured.rates = [{"metric": "label_agreement", "text": "", "hits": 10, "trials": 10}] * 2
    assert "25 more examples" in verdict(measured, precision=Precision.FP16).reason


@pytest.mark.parametrize(("trials", "outcome"), [(267, "warn"), (268, "pass")])
def test_268_faultless_examples_show_99_percent(trials: int, outcome: str) -> None:
    assert verdict(healthy(trials, trials), precision=Precision.BF16).outcome == outcome


def test_a_rate_that_is_certainly_too_low_fails() -> None:
    answer = verdict(healthy(hits=270, trials=300), precision=Precision.FP16)
    assert answer.outcome == "fail"
    assert answer.reason.startswith("fail: label_agreement measured 0.9, the limit is at least 0.99; 270 of 300")


def test_a_limit_of_one_allows_no_miss_and_needs_no_number() -> None:
    assert verdict(healthy(hits=3, trials=3)).outcome == "pass"
    assert verdict(healthy(hits=99_999, trials=100_000)).outcome == "fail"


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16, Precision.BF16])
def test_a_large_difference_fails(precision: Precision) -> None:
    measured = healthy()
    measured.comparisons.append(comparison([1.4, -1.0]))
    answer = verdict(measured, precision=precision)
    assert answer.outcome == "fail"
    first_gate = "max_abs_diff" if precision is Precision.FP32 else "rel_l2"
    assert answer.reason.startswith(f"fail: {first_gate}")


def test_numbers_of_int8_only_warn_and_its_decisions_fail() -> None:
    measured = healthy()
    measured.comparisons.append(comparison([2.0, 1.0]))
    measured.scalars["mask_leak"] = 0.9
    answer = verdict(measured, precision=Precision.INT8)
    assert answer.outcome == "warn"
    assert {gate(answer, n).outcome for n in ("mask_respected", "rel_l2", "one_minus_cosine")} == {"warn"}
    measured.scalars["confident_flips"] = 1.0
    answer = verdict(measured, precision=Precision.INT8)
    assert answer.outcome == "fail"
    assert answer.reason.startswith("fail: confident_flips")


def test_the_first_gate_of_the_suite_names_the_verdict() -> None:
    measured = healthy(hits=0)
    measured.scalars |= {"misplaced_labels": 2.0, "mask_leak": 0.5}
    measured.comparisons.append(comparison([-1.0, 1.0]))
    answer = verdict(measured)
    assert answer.reason.startswith("fail: label_order measured 2")
    failed = [result.gate for result in answer.gates if result.outcome == "fail"]
    assert failed == [
        "label_order",
        "max_abs_diff",
        "rel_l2",
        "one_minus_cosine",
        "mask_respected",
        "label_agreement",
    ]
    assert "(and 5 more)" in answer.reason


def test_a_fail_outweighs_a_warning_that_stands_before_it() -> None:
    measured = healthy()
    measured.scalars |= {"mask_leak": 0.9, "confident_flips": 1.0}
    assert verdict(measured, precision=Precision.INT8).reason.startswith("fail: confident_flips")


def test_an_error_outweighs_a_warning_and_a_fail_before_an_error_keeps_the_name() -> None:
    measured = healthy(hits=20, trials=20)
    del measured.scalars["confident_flips"]
    assert verdict(measured, precision=Precision.FP16).reason.startswith("error: confident_flips")
    # A model that answers nothing leaves the later gates without rows; the missing answers are the cause.
    measured.comparisons = [comparison([]) for _ in range(3)]
    del measured.scalars["misplaced_labels"]
    assert verdict(measured, precision=Precision.FP16).reason.startswith("fail: output_shapes")


def test_latency_is_judged_only_when_asked() -> None:
    assert "latency_ratio" not in [result.gate for result in verdict(healthy()).gates]
    slow = verdict(healthy(), latency_ratio=1.0)
    assert slow.outcome == "fail"
    assert "latency_ratio measured 2.5, the limit is at most 1" in slow.reason
    assert verdict(healthy(), latency_ratio=3.0).outcome == "pass"


def test_margin_is_the_share_of_room_left() -> None:
    measured = healthy()
    measured.scalars["mask_leak"] = 2.5e-5
    answer = verdict(measured, label_agreement=0.5, latency_ratio=2.0)
    assert gate(answer, "mask_respected").margin == pytest.approx(0.75)
    assert gate(answer, "label_agreement").margin == pytest.approx(1.0)
    assert gate(answer, "latency_ratio").margin == pytest.approx(-0.25)
    # Limits that allow no exception leave no room by design.
    assert gate(answer, "finite_outputs").margin is None
    assert gate(answer, "output_shapes").margin is None


def test_a_value_at_its_limit_passes() -> None:
    measured = healthy()
    measured.scalars["mask_leak"] = 1e-4
    answer = verdict(measured)
    assert answer.outcome == "pass"
    assert gate(answer, "mask_respected").margin == 0.0


def test_entities_have_their_own_gate() -> None:
    measured = healthy()
    measured.scalars["entity_f1"] = 0.9
    assert verdict(measured, TAG).reason.startswith("fail: entity_f1 measured 0.9, the limit is at least 0.99")
    measured.scalars["entity_f1"] = NAN
    assert "entity_f1 measured no number" in verdict(measured, TAG).reason


def test_gates_of_other_tasks_are_not_judged() -> None:
    measured = healthy()
    measured.rates = [{"metric": "neighbour_overlap", "text": "", "hits": 10, "trials": 10}] * 30
    names = [result.gate for result in verdict(measured, EMBED).gates]
    assert "neighbour_overlap" in names
    assert not {"label_order", "label_agreement", "entity_f1"} & set(names)


def test_a_gate_without_a_result_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = judging._judge_table
    monkeypatch.setattr(judging, "_judge_table", lambda *arguments: whole(*arguments)[1:])
    with pytest.raises(MeasurementError, match="Expected results of 10 gates, got 7"):
        verdict(healthy())
