"""The report: opens offline with nothing else, says everything that was measured, and lets no text run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compileflow.spec import HfTask, Precision
from compileflow.validation.cases import Case
from compileflow.validation.judge import judge
from compileflow.validation.measure import Latency, Measurements, measure_noise
from compileflow.validation.measure.flips import Flip
from compileflow.validation.measure.metrics import compare
from compileflow.validation.report import (
    Report,
    ReportSubject,
    environment,
    fraction,
    worst_rows,
    write_report,
)
from tests.unit.html_page import HtmlPage

ATTACK = "<script>alert('x')</script> & \"more\""
NAN = float("nan")


def _comparison(text: str, step: float) -> dict[str, Any]:
    row = {"case": "natural 1 to 8", "family": "agreement", "output": "logits", "text": text, "trouble": ""}
    return row | compare(np.array([1.0, 2.0]), np.array([1.0, 2.0 + step]))


@pytest.fixture
def measured() -> Measurements:
    return Measurements(
        comparisons=[_comparison("mild", 1e-6), _comparison(ATTACK, NAN), _comparison("worse", 3e-5)],
        rates=[{"metric": "label_agreement", "text": "", "hits": 3, "trials": 3}],
        scalars={"misplaced_labels": 0.0, "confident_flips": 0.0, "mask_leak": NAN, "latency_ratio": 0.5},
        noise={"rel_l2": 2e-7, "max_abs_diff": 5e-7, "rel_l2 (float64)": 2e-7},
        latencies=[Latency("1 x 16", 12.34, 6.17, 0.51, 0.47, 0.56, 30)],
    )


@pytest.fixture
def report(measured: Measurements) -> Report:
    verdict = judge(
        measured,
        precision=Precision.FP32,
        hf_task=HfTask.TEXT_CLASSIFICATION,
        overrides={"latency_ratio": 0.9},
    )
    return Report(
        subject=ReportSubject(
            source_uri="hf://owner/model",
            source_revision="abc123",
            source_digest="1" * 64,
            architecture="BertForSequenceClassification",
            artifact_uri="file:///store/manifests/sha256/2.json",
            artifact_digest="2" * 64,
            target="onnx-runtime",
            hf_task="text-classification",
            precision="fp32",
            component="default",
            toolchain={"onnxruntime": "1.24.0"},
        ),
        verdict=verdict,
        figures=measured.figures(),
        noise=measured.noise,
        latencies=tuple(measured.latencies),
        worst=worst_rows(measured.comparisons),
        families={"agreement": 3},
        examples_origin="mine.txt",
        examples_count=3,
        suite_digest="3" * 64,
        environment=environment(2),
    )


@pytest.fixture
def html(report: Report, tmp_path: Path) -> str:
    write_report(report, tmp_path)
    return (tmp_path / "report.html").read_text("utf-8")


def test_html_is_complete_and_loads_nothing(html: str) -> None:
    HtmlPage(html).assert_self_contained()


def test_html_leads_with_the_verdict_and_its_reason(html: str, report: Report) -> None:
    text = HtmlPage(html).text
    assert report.verdict.outcome == "fail"
    reason = report.verdict.reason.removeprefix("fail: ")
    assert reason in text
    assert text.index(reason) < text.index("Gates")
    assert 'class="is-fail"' in html


def test_html_shows_every_gate_with_outcome_value_and_limit(html: str, report: Report) -> None:
    text = HtmlPage(html).text
    assert len(report.verdict.gates) == 10
    for gate in report.verdict.gates:
        row = text[text.index(f"{gate.gate}\n") :][:400]
        assert gate.outcome in row
        assert (f"{gate.measured:.4g}" if gate.measured is not None else "no number") in row
        assert f"{gate.comparison} {gate.limit:.4g}" in row
        assert gate.says in row


def test_html_shows_the_margin_only_where_there_is_a_number(html: str, report: Report) -> None:
    rows = re.findall(r'<tr class="is-\w+">.*?</tr>', html, re.DOTALL)
    assert len(rows) == len(report.verdict.gates)
    by_gate = {gate.gate: row for gate, row in zip(report.verdict.gates, rows, strict=True)}
    assert "44.4 %" in by_gate["latency_ratio"]
    assert ">exact<" in by_gate["label_order"]
    assert ">exact<" not in by_gate["mask_respected"]
    assert "no number" in by_gate["mask_respected"]


def test_html_shows_latency_with_its_interval(html: str) -> None:
    text = HtmlPage(html).text
    for part in ("1 x 16", "12.34 ms", "6.17 ms", "0.51 (0.47 to 0.56)", "30"):
        assert part in text


def test_latency_of_a_busy_machine_is_marked_in_table_picture_and_json(report: Report, tmp_path: Path) -> None:
    busy = Latency("1 x 16", 40.0, 2.0, 0.05, 0.02, 0.2, 5, cpu_ratio=0.34, busy="other processes used 1.9")
    marked = report.model_copy(update={"latencies": (*report.latencies, busy)})
    page = _page(marked, tmp_path)
    text = HtmlPage(page).text
    assert text.count("measured on a busy machine") >= 2
    assert "other processes used 1.9. No gate, registry or choice uses this latency." in text
    assert "0.34" in text
    assert "0.05 of eager's latency, 95 % interval 0.02 to 0.20, measured on a busy machine" in page
    assert "0.05 (busy machine)" in page
    saved = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert saved["latencies"][1]["busy"] == "other processes used 1.9"
    assert Report.model_validate(saved) == marked


def test_report_without_marks_is_still_read(report: Report) -> None:
    saved = report.model_dump(mode="json")
    for latency in saved["latencies"]:
        del latency["cpu_ratio"], latency["busy"]
    assert Report.model_validate(saved) == report


def test_picture_shows_each_latency_against_eager_in_words_as_well(html: str) -> None:
    svg = html[html.index("<svg") : html.index("</svg>")]
    assert 'role="img"' in svg
    assert "<title>1 x 16: 0.51 of eager's latency, 95 % interval 0.47 to 0.56</title>" in svg
    assert '<desc id="latency-picture-description">1 x 16: 0.51 of eager\'s latency' in svg
    assert ">eager</text>" in svg
    assert "var(--pass)" in svg


def test_without_timings_there_is_no_picture(report: Report, tmp_path: Path) -> None:
    assert "<svg" not in _page(report.model_copy(update={"latencies": ()}), tmp_path)


def test_html_shows_the_worst_examples_first_and_those_without_a_number_before_them(html: str) -> None:
    text = HtmlPage(html).text
    worst = text[text.index("Worst examples") :]
    assert worst.index(ATTACK) < worst.index("worse") < worst.index("mild")
    assert "3e-05" in worst


def test_html_says_what_was_compared_with_what(html: str, report: Report) -> None:
    text = HtmlPage(html).text
    subject = report.subject.model_dump()
    for name in ("source_uri", "source_revision", "source_digest", "artifact_uri", "artifact_digest"):
        assert subject[name] in text
    for name in ("architecture", "target", "hf_task", "precision"):
        assert subject[name] in text
    assert "onnxruntime 1.24.0" in text
    assert "3 natural examples from mine.txt" in text
    assert report.suite_digest in text
    assert f"torch {report.environment['torch']}" in text


def test_text_of_an_example_is_shown_and_never_run(html: str) -> None:
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert ATTACK in HtmlPage(html).text


def _flip(text: str, margin: float | None) -> Flip:
    sure = margin is not None and margin > 0.1
    return Flip(metric="label_agreement", text=text, before="yes", after="no", margin=margin, sure=sure)


def _page(report: Report, folder: Path) -> str:
    write_report(report, folder)
    return (folder / "report.html").read_text("utf-8")


def test_flipped_examples_are_shown_with_what_they_were_and_became(report: Report, tmp_path: Path) -> None:
    flips = (_flip(ATTACK, 0.42), _flip("an unsure one", 0.034))
    html = _page(report.model_copy(update={"flips": flips, "flips_count": 2, "examples_count": 300}), tmp_path)
    assert "<script" not in html
    text = HtmlPage(html).text
    section = text[text.index("Flipped examples") : text.index("Latency")]
    assert "2 of 300 examples lead to another decision; all are shown" in section
    assert section.index(ATTACK) < section.index("0.420 sure") < section.index("an unsure one")
    assert "0.034 sure" not in section
    assert "0.034" in section
    for part in ("source model", "compiled model", "margin", "yes", "no"):
        assert part in section


def test_flips_that_are_not_shown_are_counted(report: Report, tmp_path: Path) -> None:
    changed = report.model_copy(update={"flips": (_flip("a", 0.4),), "flips_count": 9, "examples_count": 300})
    assert (
        "9 of 300 examples lead to another decision; the surest 1 are shown"
        in HtmlPage(_page(changed, tmp_path)).text
    )


def test_moved_neighbours_are_not_called_sure(report: Report, tmp_path: Path) -> None:
    changed = report.model_copy(update={"flips": (_flip("a", None),), "flips_count": 9, "examples_count": 300})
    text = HtmlPage(_page(changed, tmp_path)).text
    assert "by their nearest neighbours; the 1 that lost most are shown" in text
    assert "sure" not in text[text.index("Flipped examples") : text.index("Latency")]


def test_without_flips_there_is_no_section_on_them(html: str) -> None:
    assert "Flipped examples" not in html


def test_report_of_a_version_without_flips_still_loads(report: Report) -> None:
    body = report.model_dump(mode="json")
    del body["flips"], body["flips_count"]
    assert Report.model_validate(body) == report


@pytest.mark.parametrize("field", ["source_uri", "artifact_uri", "architecture"])
def test_names_are_escaped(report: Report, tmp_path: Path, field: str) -> None:
    subject = report.subject.model_copy(update={field: ATTACK})
    write_report(report.model_copy(update={"subject": subject}), tmp_path)
    assert "<script" not in (tmp_path / "report.html").read_text("utf-8")


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def test_json_round_trips_without_nan(report: Report, tmp_path: Path) -> None:
    report = report.model_copy(update={"flips": (_flip("a", 0.2), _flip("b", None)), "flips_count": 2})
    write_report(report, tmp_path)
    body = json.loads((tmp_path / "report.json").read_text("utf-8"), parse_constant=_refuse)
    assert Report.model_validate(body) == report
    assert body["worst"][0]["rel_l2"] is None


def test_noise_without_a_number_does_not_reach_the_report() -> None:
    ids = np.ones((1, 2), np.int64)
    case = Case("natural 1", "agreement", ("a",), {"input_ids": ids}, ids)
    measurements = Measurements()

    def zeros(inputs: dict[str, Any]) -> dict[str, Any]:
        return {"logits": np.zeros((1, 2))}

    # Exact zeros in one precision but not in another: the model is infinitely far from itself.
    measure_noise(measurements, {"float64": lambda case: {"logits": np.full((1, 2), 1e-9)}}, zeros, [case])
    assert measurements.noise == {"max_abs_diff": 1e-9}


def test_figures_hold_numbers_only(measured: Measurements) -> None:
    figures = measured.figures()
    assert np.isfinite(list(figures.values())).all()
    # With one comparison without a number, the worst value is unknown.
    assert "rel_l2" not in figures
    assert "mask_leak" not in figures
    assert figures["label_agreement"] == 1.0
    assert figures["latency_ratio_high"] == 0.56


@pytest.mark.parametrize(
    ("ratio", "text"), [(0.8312, "0.83"), (0.0532, "0.053"), (0.00418, "0.0042"), (12.3, "12.30"), (0.0, "0.00")]
)
def test_latency_of_a_fast_model_has_two_significant_digits(ratio: float, text: str) -> None:
    assert fraction(ratio) == text


def test_the_worst_comparison_by_each_difference_is_listed() -> None:
    names = ("scaled_diff", "rel_l2", "one_minus_cosine")
    rows = [{"case": name, **dict.fromkeys(names, 0.5)} for name in "abcdefghijklm"]
    worst = [{"case": name, **dict.fromkeys(names, 1e-3), name: 1.0} for name in names]
    listed = worst_rows([*rows, *worst])
    assert len(listed) == 10
    assert {row["case"] for row in listed[:3]} == set(names)


def test_noise_multiple_is_the_worst_difference_over_the_floor(report: Report) -> None:
    measured_report = report.model_copy(update={"figures": {"rel_l2": 1e-6}})
    assert measured_report.noise_multiple == pytest.approx(5.0)
    assert report.noise_multiple is None
    assert measured_report.model_copy(update={"noise": {"rel_l2": 0.0}}).noise_multiple is None
