"""A user's suite: what is refused before the compile, and that its gates never loosen compileflow's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from compileflow.errors import SpecError
from compileflow.spec import ComponentSpec, HfTask, Precision, ShapeBucket
from compileflow.steps.run import run_request
from compileflow.validation.judge import UserSuite, Verdict, gates_for, judge, load_user_suite, parse_user_suite
from compileflow.validation.judge.suite import EXPECTATION_TYPES, load_suite
from compileflow.validation.measure import Measurements
from compileflow.validation.report import DATA_DOCS_FOLDER
from tests.conftest import ModelFactory
from tests.in_process import InProcess
from tests.steps import Pipeline
from tests.unit.html_page import HtmlPage
from tests.unit.proving import validate_here
from tests.unit.test_judge import NAN, comparison, gate, healthy

FP32, FP16, INT8 = Precision.FP32, Precision.FP16, Precision.INT8
CLASSIFY, EMBED = HfTask.TEXT_CLASSIFICATION, HfTask.FEATURE_EXTRACTION
ELEMENT = {
    "gate": "largest_element",
    "says": "largest difference of a logit",
    "table": "comparisons",
    "type": "expect_column_maximum_to_be_at_most",
    "column": "max_abs_diff",
    "output": "logits",
    "limit": "element",
}
LABELS = {
    "gate": "most_labels",
    "says": "labels that stay",
    "table": "rates",
    "type": "expect_rate_to_be_at_least",
    "metric": "label_agreement",
    "limit": 0.5,
}
FLIPS = {
    "gate": "few_flips",
    "says": "sure labels that flip",
    "table": "scalars",
    "type": "expect_column_maximum_to_be_at_most",
    "metric": "confident_flips",
    "limit": "1e1",
}


def text(*gates: dict[str, Any], **fields: Any) -> str:
    body = {"schema_version": 1, "name": "our-service", "gates": list(gates), "limits": {}}
    if ELEMENT["limit"] in [entry.get("limit") for entry in gates]:
        body["limits"] = {"element": {"fp32": 1e-3, "fp16": 1e-2}}
    return yaml.safe_dump(body | fields)


def suite(*gates: dict[str, Any], **fields: Any) -> UserSuite:
    return parse_user_suite(text(*gates, **fields), "ours.yaml")


def verdict(measured: Measurements, users: UserSuite | None, precision: Precision = FP32) -> Verdict:
    return judge(measured, precision=precision, hf_task=CLASSIFY, user_suite=users)


def test_gates_of_a_user_are_judged_after_compileflows_and_marked() -> None:
    answer = verdict(healthy(), suite(ELEMENT, LABELS, FLIPS))
    assert answer.reason == "pass: all 13 gates hold, 3 of them of the suite our-service"
    assert [(result.gate, result.suite) for result in answer.gates[-3:]] == [
        ("largest_element", "our-service"),
        ("most_labels", "our-service"),
        ("few_flips", "our-service"),
    ]
    assert {result.suite for result in answer.gates[:-3]} == {""}
    assert [result.limit for result in answer.gates[-3:]] == [1e-3, 0.5, 10.0]


def test_a_gate_of_a_user_can_fail_alone_and_names_its_suite() -> None:
    measured = healthy()
    measured.comparisons.append(comparison([1.0 + 5e-5, -1.0]))
    assert verdict(measured, None).outcome == "pass"
    answer = verdict(measured, suite(ELEMENT | {"limit": "1e-5"}))
    assert answer.outcome == "fail"
    assert answer.reason.startswith("fail: largest_element of the suite our-service measured 5e-05, the limit is")
    # NaN has no place beyond a limit, and fails.
    measured.comparisons.append(comparison([NAN, -1.0]))
    assert gate(verdict(measured, suite(ELEMENT | {"limit": 9e9})), "largest_element").outcome == "fail"


def test_a_gate_that_warns_does_not_block() -> None:
    measured = healthy()
    measured.comparisons.append(comparison([1.0 + 5e-5, -1.0]))
    assert verdict(measured, suite(ELEMENT | {"limit": 1e-5, "severity": "warning"})).outcome == "warn"
    by_precision = suite(ELEMENT | {"limit": 1e-5}, warnings={"fp32": ["largest_element"]})
    assert verdict(measured, by_precision).outcome == "warn"
    assert gate(verdict(measured, by_precision, FP16), "largest_element").outcome == "fail"


def test_a_gate_without_anything_to_judge_is_an_error() -> None:
    measured = healthy()
    del measured.scalars["confident_flips"]
    answer = verdict(measured, suite(FLIPS))
    assert gate(answer, "few_flips").outcome == "error"
    other = healthy()
    for row in other.comparisons:
        row["output"] = "scores"
    assert gate(verdict(other, suite(ELEMENT)), "largest_element").outcome == "error"


def test_a_suite_of_a_user_changes_nothing_about_compileflows_gates() -> None:
    # Of one rate alone, 10 misses of 400 are beyond 99 % (p = 0.008). Holm's correction over two rates would ask
    # for p < 0.005, so a gate of the user would loosen ours.
    measured = healthy(hits=390, trials=400)
    alone = verdict(measured, None, FP16)
    assert gate(alone, "label_agreement").outcome == "fail"
    users = suite(LABELS, limits={"label_agreement": {"fp16": 0.1}}, gates=[LABELS | {"limit": "label_agreement"}])
    both = verdict(measured, users, FP16)
    assert gate(both, "most_labels").outcome == "pass"
    assert both.gates[:-1] == alone.gates
    assert both.reason == alone.reason
    assert gates_for(FP16, CLASSIFY, {}) == gates_for(FP16, CLASSIFY, {})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"type": "expect_column_values_to_be_between"}, "unknown type 'expect_column_values_to_be_between'"),
        ({"severity": "fatal"}, "severity"),
        ({"table": "nowhere"}, "table"),
        ({"column": "max_abs_dif"}, "comparisons has no column 'max_abs_dif'; choose one of: shape_matches"),
        ({"gate": "rel_l2"}, "gate 'rel_l2': compileflow has a gate of this name"),
        ({"gate": "Largest element"}, "expected a name of lower-case letters"),
        ({"noise": "rel_l2"}, "only compileflow's own gates have 'noise'"),
        ({"optional": "all"}, "only compileflow's own gates have 'optional'"),
        ({"metric": "label_agreement"}, "comparisons have columns, not metrics"),
        ({"type": "expect_rate_to_be_at_least"}, "the table comparisons does not fit the type"),
        ({"tasks": ["text-ranking"]}, "text-ranking has the gates of text-classification; write that"),
        ({"tasks": []}, "the list is empty"),
        ({"limit": "nothing"}, "limits has no nothing"),
        ({"limit": ".nan"}, "limits"),
        ({"limit": True}, "expected a number or the name of a limit, got True"),
        ({"limit": "inf"}, "expected a finite number"),
        ({"colum": "rel_l2"}, "gates.0.colum: this name is not known"),
    ],
)
def test_a_gate_that_cannot_be_judged_is_refused_in_one_line(change: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError) as caught:
        suite(ELEMENT | change)
    message = str(caught.value)
    assert message.startswith("The suite ours.yaml cannot be used: ")
    assert says in message
    assert "\n" not in message


# Twenty lists, each of which has the last one twice: a million values.
BOMB = "l0: &l0 [1, 1]\n" + "".join(f"l{n}: &l{n} [*l{n - 1}, *l{n - 1}]\n" for n in range(1, 20))


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("", "expected schema_version, name, gates and limits"),
        ("- gate: a", "expected schema_version, name, gates and limits"),
        ("gates: [", "line 1: "),
        ("name: a\nname: b", "line 2: name: the key stands twice"),
        ("a: &a [*a]", "more than 100000 values"),
        (BOMB, "more than 100000 values"),
        ("[" * 5000, "nested too deeply"),
        (text(ELEMENT, name="regression"), "name: compileflow's own suite has this name"),
        (text(), "gates: "),
        (text(ELEMENT, name="our service"), "name: expected letters"),
        (text(ELEMENT, ELEMENT), "two gates share a name"),
        (text(ELEMENT, limits={"element": {}}), "expected a finite number for some precision in 'element'"),
        (text(ELEMENT, limits={"element": {"fp12": 1}}), "fp12"),
        (text(LABELS | {"limit": 99}), "expected a limit from 0 to 1 for a rate"),
        (text(LABELS | {"metric": "accurracy"}), "unknown metric 'accurracy'; choose one of: box_agreement"),
        (text(LABELS | {"output": "logits"}), "only comparisons have outputs"),
        (text(FLIPS | {"metric": None}), "unknown metric None"),
    ],
)
def test_a_file_that_is_not_a_suite_is_refused_in_one_line(body: str, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_user_suite(body, "ours.yaml")
    message = str(caught.value)
    assert says in message
    assert "\n" not in message


def test_a_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ours.yaml"
    path.write_bytes(text(ELEMENT).encode() + b"# caf\xe9")
    with pytest.raises(SpecError, match=r"ours\.yaml is not UTF-8\. Save the file as UTF-8\."):
        load_user_suite(str(path))


def test_gates_that_find_nothing_in_a_model_are_refused() -> None:
    suite(ELEMENT, LABELS, FLIPS).check(CLASSIFY, FP16, ["logits"])
    with pytest.raises(SpecError, match="no gate applies to text-classification at int8"):
        suite(ELEMENT).check(CLASSIFY, INT8)
    with pytest.raises(SpecError, match="no gate applies to feature-extraction"):
        suite(ELEMENT | {"tasks": ["text-classification"]}).check(EMBED)
    with pytest.raises(SpecError, match="gate 'most_labels': label_agreement is not measured for feature-extrac"):
        suite(LABELS).check(EMBED, FP32)
    with pytest.raises(SpecError, match=r"does not have the output 'logits'.*Choose one of: last_hidden_state"):
        suite(ELEMENT).check(EMBED, FP32, ["last_hidden_state"])


def test_two_equal_gates_are_both_judged() -> None:
    # Great Expectations keeps one of two equal expectations, and says nothing about the other one.
    answer = verdict(healthy(), suite(LABELS, LABELS | {"gate": "again"}))
    assert [result.gate for result in answer.gates[-2:]] == ["most_labels", "again"]


def test_every_expectation_type_is_registered() -> None:
    from great_expectations.expectations.registry import get_expectation_impl

    from compileflow.validation.judge import expectations

    for name in EXPECTATION_TYPES:
        assert get_expectation_impl(name).__module__ == expectations.__name__
    assert {entry.type for entry in load_suite().gates} == set(EXPECTATION_TYPES)


def test_an_unusable_suite_is_refused_before_the_compile(
    pipeline: Pipeline, tiny_model: ModelFactory, tmp_path: Path
) -> None:
    model, path = tiny_model(CLASSIFY), tmp_path / "ours.yaml"

    def refusal(**fields: Any) -> str:
        request = pipeline.request(model, validation={"latency_pairs": 5, "suite_path": str(path)}, **fields)
        with pytest.raises(SpecError) as caught:
            run_request(request, pipeline.settings)
        return str(caught.value)

    assert "ours.yaml cannot be read: No such file" in refusal()
    path.write_text(text(ELEMENT | {"type": "expect_nothing"}))
    assert "unknown type 'expect_nothing'" in refusal()
    path.write_text(text(ELEMENT | {"metric": "top5_overlap", "table": "rates"} | {"output": None}))
    assert "does not fit the type" in refusal()
    path.write_text(text(LABELS | {"metric": "top5_overlap"}))
    assert "top5_overlap is not measured for text-classification at fp32" in refusal()
    assert "top5_overlap is not measured for text-classification at fp32" in refusal(hf_task=CLASSIFY)
    assert pipeline.counts["compile"] == 0
    # config.json names the task, so that the model was not even fetched.
    assert not (pipeline.settings.home_dir / "store").exists()
    # The loaded model alone knows its outputs.
    path.write_text(text(ELEMENT | {"output": "scores"}))
    assert "the model does not have the output 'scores'" in refusal()
    assert pipeline.counts["validate"] == 0


def test_a_failed_gate_of_a_user_stands_in_the_report_and_shows_again(
    tiny_model: ModelFactory, in_process: InProcess, tmp_path: Path
) -> None:
    source_dir = tiny_model(CLASSIFY)
    component = ComponentSpec(shape_buckets=(ShapeBucket(batch_size=2, sequence_length=32),))
    artifact_dir = in_process.compile(
        source_dir, tmp_path / "artifact", target="torchscript", hf_task=CLASSIFY, components=[component]
    )
    path = tmp_path / "ours.yaml"
    path.write_text(text(ELEMENT | {"limit": -1}, LABELS))
    users = load_user_suite(str(path))
    proof = validate_here(source_dir, artifact_dir, tmp_path / "report", max_examples=10, suite=users)
    assert proof.reason.startswith("fail: largest_element of the suite our-service measured ")
    assert proof.gate("most_labels")["suite"] == "our-service"
    assert (proof.report["user_suite"], proof.report["user_suite_digest"]) == ("our-service", users.digest)
    page = HtmlPage((tmp_path / "report" / "report.html").read_text("utf-8"))
    page.assert_self_contained()
    assert "largest_element (suite our-service)" in page.text
    assert f"the user's suite our-service: {users.digest}" in page.text
    assert "The module cannot be named. The outputs agree within compileflow's own limits." in page.text
    # They cost time, and were not requested.
    assert not (tmp_path / "report" / DATA_DOCS_FOLDER).exists()
    failure = json.loads((tmp_path / "report" / "bundle" / "failure.json").read_text("utf-8"))
    assert failure["suite"] == {"text": users.text, "origin": "ours.yaml"}
    assert (failure["failure"]["figure"]["gate"], failure["failure"]["figure"]["output"]) == (
        "largest_element",
        "logits",
    )
