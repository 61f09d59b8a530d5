"""The early verdict: it refuses only what the whole judge refuses, whatever the noise of the source model is."""

from __future__ import annotations

import pytest

from compileflow.spec import Precision
from compileflow.validation.judge.early import early_verdict
from compileflow.validation.measure import Measurements
from tests.unit.test_judge import CLASSIFY, EMBED, NAN, comparison, healthy, verdict

FP32, BF16, INT8 = Precision.FP32, Precision.BF16, Precision.INT8


def neighbours(hits: int, trials: int = 3000) -> Measurements:
    rates = [{"metric": "neighbour_overlap", "text": "", "hits": hits, "trials": trials}]
    return Measurements(comparisons=[comparison()], rates=rates)


def test_equal_answers_may_still_pass() -> None:
    assert early_verdict(healthy(), precision=FP32, hf_task=CLASSIFY) == ("", "")


@pytest.mark.parametrize("answer", [[NAN, 0.0], [1.0]])
def test_nan_and_wrong_shapes_are_certain_to_fail(answer: list[float]) -> None:
    measured = healthy()
    measured.comparisons.append(comparison(answer))
    outcome, reason = early_verdict(measured, precision=INT8, hf_task=CLASSIFY)
    whole = verdict(measured, precision=INT8)
    assert (outcome, whole.outcome) == ("fail", "fail")
    assert reason.split(" measured")[0] == whole.reason.split(" measured")[0]


def test_rate_fails_only_below_the_loosest_limit() -> None:
    # 0.98 is the limit at int8; rounding the source model moves it to 0.7 at most.
    assert early_verdict(healthy(240), precision=INT8, hf_task=CLASSIFY)[0] == ""
    measured = healthy(150)
    outcome, reason = early_verdict(measured, precision=INT8, hf_task=CLASSIFY)
    assert (outcome, reason) == ("fail", "fail: label_agreement measured 0.5, the limit is at least 0.7")
    measured.grid = {"label_agreement": 0.5}
    whole = verdict(measured, precision=INT8)
    assert whole.outcome == "fail"
    assert whole.reason.startswith("fail: label_agreement measured 0.5, the limit is at least 0.7;")


def test_limit_of_the_user_does_not_move() -> None:
    answer = early_verdict(healthy(240), precision=INT8, hf_task=CLASSIFY, overrides={"label_agreement": 0.98})
    assert answer == ("fail", "fail: label_agreement measured 0.8, the limit is at least 0.98")


def test_few_examples_decide_nothing() -> None:
    # 1 miss in 20 is not yet a sign that fewer than 99 % agree.
    assert early_verdict(healthy(19, 20), precision=BF16, hf_task=CLASSIFY)[0] == ""


def test_gate_that_only_warns_gives_a_warning_and_a_failure_comes_first() -> None:
    # MiniLM on onnx-runtime at dynamic int8 keeps 0.91; the gate warns below 0.95, and another fails below 0.9.
    outcome, reason = early_verdict(neighbours(2730), precision=INT8, hf_task=EMBED)
    assert (outcome, reason) == ("warn", "warn: neighbour_overlap measured 0.91, the limit is at least 0.95")
    assert early_verdict(neighbours(600), precision=INT8, hf_task=EMBED)[1].startswith("fail: neighbour_floor")
