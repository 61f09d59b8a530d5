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


def test_latency_of_a_busy_machine_is_not_judged_and_the_reason_says_so() -> None:
    measured = healthy()
    del measured.scalars["latency_ratio"]
    measured.unusable["latency_ratio"] = "measured on a busy machine (other processes used 1.9 of 2 processors)"
    sentence = f"latency_ratio not judged: {measured.unusable['latency_ratio']}"
    answer = verdict(measured, latency_ratio=1e-6)
    assert answer.outcome == "pass"
    assert answer.reason == f"pass: all 10 gates hold; {sentence}"
    assert sentence in answer.notes
    # Without a limit there is nothing to judge and nothing to say.
    assert verdict(measured).reason == "pass: all 10 gates hold"
    measured.scalars["mask_leak"] = 1.0
    failed = verdict(measured, latency_ratio=1e-6)
    assert failed.outcome == "fail"
    assert "latency_ratio" not in failed.reason
    assert sentence in failed.notes


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


def padded(candidate: list[float]) -> dict[str, Any]:
    """Return a row with padding."""
    return comparison(candidate) | {"plain": 0}


def test_a_difference_of_padded_rows_alone_is_explained_by_the_mask() -> None:
    measured = healthy()
    measured.comparisons = [row | {"plain": 1} for row in measured.comparisons] + [padded([1.4, -1.0])]
    measured.scalars["mask_leak"] = 0.4
    assert verdict(measured).reason.startswith("fail: mask_respected measured 0.4")
    # Rows without padding differ as well: the mask is not the reason.
    measured.comparisons.append(comparison([1.4, -1.0]) | {"plain": 1})
    assert verdict(measured).reason.startswith("fail: max_abs_diff measured 0.4")
    # No probe fails: padded rows speak for themselves.
    measured.comparisons.pop()
    measured.scalars["mask_leak"] = 0.0
    assert verdict(measured).reason.startswith("fail: max_abs_diff measured 0.4")
    # NaN comes first, wherever it is.
    measured.comparisons.append(padded([NAN, -1.0]))
    measured.scalars["mask_leak"] = NAN
    assert verdict(measured).reason.startswith("fail: finite_outputs")


def test_a_noisy_source_model_moves_a_limit_of_fp32_up_to_ten_times() -> None:
    measured = healthy()
    measured.comparisons.append(comparison([1.0 + 4e-4, -1.0]))
    assert verdict(measured).outcome == "fail"
    measured.floors = {"logits": {"scaled_diff": 2.5e-5, "rel_l2": 2.5e-5, "one_minus_cosine": 1e-9}}
    answer = verdict(measured)
    assert answer.outcome == "pass", answer.reason
    result = gate(answer, "max_abs_diff")
    assert (result.measured, result.limit) == (pytest.approx(4e-4), pytest.approx(20 * 2.5e-5))
    assert (result.floor, result.multiple) == (2.5e-5, pytest.approx(16.0))
    assert "limit raised from 0.0001: the source model's own noise in logits is 2.5e-05" in result.detail
    # However noisy the source model is, a difference of 1e-3 is too much.
    measured.floors = {"logits": {"scaled_diff": 0.5, "rel_l2": 0.5, "one_minus_cosine": 0.5}}
    measured.comparisons.append(comparison([1.0 + 2e-3, -1.0]))
    answer = verdict(measured)
    assert answer.reason.startswith("fail: max_abs_diff measured 0.002, the limit is at most 0.001")


def test_the_noise_of_one_output_does_not_open_the_gate_for_another() -> None:
    measured = healthy()
    measured.floors = {"pooled": {"scaled_diff": 5e-5, "rel_l2": 5e-5}, "logits": {"scaled_diff": 1e-8}}
    measured.comparisons.append(comparison([1.0 + 4e-4, -1.0]) | {"output": "pooled"})
    assert verdict(measured).outcome == "pass"
    measured.comparisons.append(comparison([1.0 + 4e-4, -1.0]))
    answer = verdict(measured)
    assert answer.outcome == "fail"
    assert gate(answer, "max_abs_diff").limit == 1e-4


def test_noise_does_not_move_a_limit_that_someone_set() -> None:
    measured = healthy()
    measured.floors = {"logits": {"scaled_diff": 5e-5, "rel_l2": 5e-3, "one_minus_cosine": 0.0}}
    measured.comparisons.append(comparison([1.0 + 4e-4, -1.0]))
    assert gate(verdict(measured, max_abs_diff=1e-4), "max_abs_diff").outcome == "fail"


def test_rounding_moves_the_differences_of_bf16_but_not_without_bound() -> None:
    measured = healthy()
    measured.floors = {"logits": {"rel_l2": 5e-7, "one_minus_cosine": 1e-13}}
    measured.comparisons.append(comparison([1.1, -1.3]))
    assert verdict(measured, precision=Precision.BF16).reason.startswith("fail: rel_l2 measured 0.2")
    measured.grid_floors = {"logits": {"rel_l2": 0.08, "one_minus_cosine": 3e-3}}
    answer = verdict(measured, precision=Precision.BF16)
    assert answer.outcome == "pass", answer.reason
    result = gate(answer, "rel_l2")
    assert (result.limit, result.floor) == (pytest.approx(0.24), 0.08)
    assert "limit raised from 0.05: rounding the source model to bf16 alone gives 0.08 in logits" in result.detail
    # 1 - cosine is half the square of rel_l2.
    assert gate(answer, "one_minus_cosine").limit == pytest.approx(9 * 3e-3)
    measured.grid_floors = {"logits": {"rel_l2": 0.9, "one_minus_cosine": 0.5}}
    answer = verdict(measured, precision=Precision.BF16)
    assert gate(answer, "rel_l2").limit == pytest.approx(0.5)
    assert gate(answer, "one_minus_cosine").limit == pytest.approx(0.1)


def test_strict_does_not_let_rounding_change_decisions() -> None:
    measured = healthy(hits=296)
    measured.grid = {"label_agreement": 0.95}
    assert gate(verdict(measured, precision=Precision.BF16), "label_agreement").limit == pytest.approx(0.9)
    answer = judge(measured, precision=Precision.BF16, hf_task=CLASSIFY, strict=True)
    assert gate(answer, "label_agreement").limit == pytest.approx(0.999)
    assert answer.outcome == "fail"


def test_a_pass_names_the_gates_that_hold_only_because_a_limit_moved() -> None:
    measured = healthy(hits=285)
    measured.grid = {"label_agreement": 0.93}
    answer = verdict(measured, precision=Precision.BF16)
    assert answer.reason == "pass: all 9 gates hold; label_agreement only because rounding moved its limit"


def test_rounding_moves_a_single_figure_by_what_it_does_to_that_figure() -> None:
    measured = healthy()
    measured.grid_floors = {"logits": {"rel_l2": 0.1, "one_minus_cosine": 5e-3}}
    measured.grid = {"embedding_error": 0.03}
    measured.scalars |= {"embedding_error": 0.08, "mask_leak": 0.06}
    measured.rates = [{"metric": "neighbour_overlap", "text": "", "hits": 300, "trials": 300}]
    answer = verdict(measured, HfTask.FEATURE_EXTRACTION, Precision.BF16)
    assert gate(answer, "embedding_error").limit == pytest.approx(0.09)
    # Rounding does not let masked tokens leak.
    assert gate(answer, "mask_respected").limit == 0.05
    assert answer.reason.startswith("fail: mask_respected measured 0.06")


def test_rounding_to_int8_moves_limits_but_not_without_bound() -> None:
    measured = healthy(hits=280)
    measured.scalars |= {"typical_error": 0.25, "gain_error": 0.0, "response_error": 0.0, "mask_ignored": 0.0}
    assert verdict(measured, precision=Precision.INT8).reason.startswith("fail: typical_error measured 0.25")
    measured.grid = {"typical_error": 0.1, "label_agreement": 0.93, "confident_flips": 0.0}
    answer = verdict(measured, precision=Precision.INT8)
    assert answer.outcome == "warn" or answer.outcome == "pass", answer.reason
    assert gate(answer, "typical_error").limit == pytest.approx(0.3)
    assert gate(answer, "label_agreement").limit == pytest.approx(0.86)
    assert "rounding the source model to int8 alone gives 0.93" in gate(answer, "label_agreement").detail
    # A source model that nothing but chance decides does not excuse chance.
    measured.grid = {"typical_error": 5.0, "label_agreement": 0.1}
    measured.scalars["typical_error"] = 0.6
    answer = verdict(measured, precision=Precision.INT8)
    assert answer.reason.startswith("fail: typical_error measured 0.6, the limit is at most 0.5")
    assert gate(answer, "label_agreement").limit == pytest.approx(0.7)


def test_a_rate_comes_with_its_statistics() -> None:
    measured = healthy(hits=297)
    measured.rates[0] |= {"ties": 1}
    measured.rates[1] |= {"ties": 1}
    result = gate(verdict(measured, precision=Precision.FP16), "label_agreement")
    assert result.evidence is not None
    assert (result.evidence.right_to_wrong, result.evidence.wrong_to_right, result.evidence.ties) == (3, 0, 2)
    # Three changes of one kind: 2 * 0.5^3. Without a change in 300, 1 - 0.05^(1/300) of them may still change.
    assert result.evidence.p_value == pytest.approx(0.25)
    assert result.evidence.smallest_loss == pytest.approx(0.009936, abs=1e-6)
    assert "2 ties of the source model count as equal" in result.detail
    assert "3 changed; exact McNemar p = 0.25" in result.detail
    assert "a loss of 0.99 % would have shown" in result.detail


def test_changes_for_the_better_are_told_from_those_for_the_worse() -> None:
    measured = healthy(hits=296)
    for row in measured.rates[296:]:
        row |= {"right_to_wrong": 0, "wrong_to_right": 1}
    result = gate(verdict(measured, precision=Precision.FP16), "label_agreement")
    assert "4 changed, 0 for the worse and 4 for the better; exact McNemar p = 0.12" in result.detail
    evidence = result.evidence
    assert evidence is not None
    assert (evidence.right_to_wrong, evidence.wrong_to_right) == (0, 4)
    assert evidence.p_value == pytest.approx(0.125)


def test_absence_of_significance_is_not_a_pass() -> None:
    # Three changes of 300 are 1 %, which is the limit; no test finds a loss, and none rules out one of 2 %.
    answer = verdict(healthy(hits=297), precision=Precision.FP16)
    assert answer.outcome == "warn"
    assert "inconclusive" in answer.reason


def test_a_rate_just_below_its_limit_is_not_refused() -> None:
    # 8 changes of 300 have a probability of 1.2 % at a rate of 0.99, 9 of 0.4 %.
    assert verdict(healthy(hits=292), precision=Precision.FP16).outcome == "warn"
    assert verdict(healthy(hits=291), precision=Precision.FP16).outcome == "fail"


def test_strict_allows_a_tenth_of_the_changes() -> None:
    answer = judge(healthy(), precision=Precision.FP16, hf_task=CLASSIFY, strict=True)
    assert answer.outcome == "warn"
    # n / (n + 2.705543) >= 0.999 needs 2703 examples.
    assert "2403 more examples" in answer.reason
    assert gate(answer, "label_agreement").limit == pytest.approx(0.999)


def test_results_of_older_reports_are_read() -> None:
    body = gate(verdict(healthy()), "label_agreement").model_dump()
    older = {name: value for name, value in body.items() if name not in ("floor", "multiple", "evidence")}
    assert GateResult.model_validate(older).evidence is None
