"""The comparison's page, table, picture and JSON: all candidates with their numbers, and the winner."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from pydantic import ValidationError

from compileflow.selection.candidates import Candidate
from compileflow.selection.choice import choose
from compileflow.selection.comparison import Comparison, write_comparison
from compileflow.selection.scatter import letter, scatter
from compileflow.spec import HfTask, Objective
from tests.unit.html_page import HtmlPage
from tests.unit.test_choice import candidate

WINNER = "openvino int8 quantization=static"
ATTACK = "<script>alert('x')</script> & \"more\""

# Latency at 1 x 16 and 8 x 16 as a fraction of eager's 10 ms per row, then the share of changed decisions.
CANDIDATES = (
    candidate("torchscript", (0.8, 0.9), size_bytes=88_000_000, serving_memory_bytes=500_000_000),
    candidate("onnx-runtime", (0.4, 0.9), 0.0, size_bytes=87_000_000, compile_duration_s=12.34, cached=True),
    candidate(
        "openvino",
        (0.2, 0.3),
        0.01,
        precision="int8",
        options={"quantization": "static"},
        size_bytes=22_000_000,
        compile_duration_s=13.0,
        artifact_uri="file:///store/manifests/sha256/1.json",
        report_uri="file:///store/manifests/sha256/2.json",
    ),
    candidate(
        "aot-inductor",
        (0.3, 0.2),
        0.4,
        outcome="fail",
        reason=f"fail: label_agreement measured 0.6, the limit is at least 0.98; {ATTACK}",
    ),
    candidate("onnx-runtime", (0.2, 0.25), 0.012, precision="int8", outcome="warn", reason="warn: inconclusive"),
    candidate(
        "neuron", None, None, outcome="unavailable", reason="torch-neuron is not installed", size_bytes=None
    ),
    candidate("tensorrt", None, None, outcome="error", reason="CompileError: out of memory", size_bytes=None),
)


def compared(
    candidates: tuple[Candidate, ...] = CANDIDATES, *, allow_warn: bool = False, **fields: Any
) -> Comparison:
    objective = Objective(**fields)
    winner, reason = choose(candidates, objective, allow_warn=allow_warn)
    return Comparison(
        source_uri="hf://owner/model",
        source_revision="abc123",
        source_digest="1" * 64,
        hf_task=HfTask.TEXT_CLASSIFICATION,
        objective=objective,
        allow_warn=allow_warn,
        candidates=candidates,
        winner=winner,
        reason=reason,
        environment={"machine": "x86_64", "torch": "2.13.0"},
    )


def page_of(comparison: Comparison, folder: Path) -> HtmlPage:
    write_comparison(comparison, folder)
    return HtmlPage((folder / "comparison.html").read_text("utf-8"))


@pytest.fixture
def page(tmp_path: Path) -> HtmlPage:
    return page_of(compared(), tmp_path)


def words(markup: str) -> str:
    """Return the text of some HTML, with one space between elements."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", markup)).split())


def test_page_loads_nothing(page: HtmlPage) -> None:
    page.assert_self_contained()


def test_page_leads_with_the_winner_and_the_reason(page: HtmlPage) -> None:
    body = words(page.html[page.html.index("<body") : page.html.index("<table")])
    assert body == (
        "7 candidates for hf://owner/model "
        "Task text-classification; objective latency; candidates with the verdict warn cannot be chosen "
        "openvino int8 quantization=static "
        "0.24 of eager's latency, the lowest of 3 that passed their gates (4 dropped) Candidates"
    )


def test_page_shows_every_candidate_with_its_numbers_and_why_it_was_dropped(page: HtmlPage) -> None:
    rows = [words(row) for row in re.findall(r"<tbody.*?</tbody>", page.html, re.DOTALL)]
    assert rows == [
        "A torchscript fp32 pass 0.80 8.00 ms 0.90 72.00 ms 125 0 % 88.0 MB 500.0 MB - all gates hold",
        "B onnx-runtime fp32 front pass 0.40 4.00 ms 0.90 72.00 ms 250 0 % 87.0 MB - 12.3 s, cached "
        "all gates hold",
        "C openvino int8 quantization=static chosen pass 0.20 2.00 ms 0.30 24.00 ms 500 1 % 22.0 MB - 13.0 s "
        "all gates hold",
        "D aot-inductor fp32 fail 0.30 3.00 ms 0.20 16.00 ms 500 40 % 80.0 MB - - "
        f"dropped: label_agreement measured 0.6, the limit is at least 0.98; {ATTACK}",
        "E onnx-runtime int8 warn 0.20 2.00 ms 0.25 20.00 ms 500 1.2 % 80.0 MB - - "
        "dropped: a warning is not allowed: inconclusive",
        "F neuron fp32 unavailable - - - - - - - dropped: torch-neuron is not installed",
        "G tensorrt fp32 error - - - - - - - dropped: CompileError: out of memory",
    ]


def test_page_names_artifacts_reports_source_and_machine(page: HtmlPage) -> None:
    for part in (
        "file:///store/manifests/sha256/1.json",
        "file:///store/manifests/sha256/2.json",
        "hf://owner/model at abc123",
        "1" * 64,
        "machine x86_64, torch 2.13.0",
    ):
        assert part in page.text


def test_names_and_reasons_are_shown_and_never_run(tmp_path: Path) -> None:
    hostile = candidate(ATTACK, 0.1, 0.0, reason=ATTACK, artifact_uri=ATTACK, options={ATTACK: ATTACK})
    page = page_of(compared((hostile, *CANDIDATES)).model_copy(update={"source_uri": ATTACK}), tmp_path)
    assert "<script" not in page.html
    assert page.text.count(ATTACK) >= 6
    # The winner's name stands in the picture's description and tooltip.
    svg = page.html[page.html.index("<svg") : page.html.index("</svg>")]
    assert svg.count("&lt;script&gt;") >= 2


def test_page_without_a_winner_says_so(tmp_path: Path) -> None:
    page = page_of(compared(max_size_bytes=10), tmp_path)
    assert "none chosen" in page.text
    assert "None of 7 candidates can be chosen" in page.text
    assert 'class="verdict is-fail"' in page.html
    assert "size 22.0 MB, at most 0.0 MB is allowed" in page.text


def test_page_of_candidates_that_were_never_timed_has_no_picture(tmp_path: Path) -> None:
    page = page_of(compared(CANDIDATES[5:]), tmp_path)
    assert "svg" not in page.tags
    assert "tensorrt fp32" in page.text


class Picture:
    """The picture as a reader sees it: circles by tooltip, and texts by content."""

    def __init__(self, page: str):
        svg = page[page.index("<svg") : page.index("</svg>") + len("</svg>")]
        self.root = ElementTree.fromstring(svg)  # noqa: S314 - the code under test wrote it
        self.texts = ["".join(element.itertext()) for element in self.root.iter("text")]

    def circle(self, label: str) -> tuple[float, float, float, str]:
        """Return centre, width and style of the circle whose tooltip starts with a letter and a label."""
        (group,) = (g for g in self.root.iter("g") if (g.findtext("title") or "").startswith(label))
        (path,) = group.iter("path")
        numbers = [float(number) for number in re.findall(r"-?\d+\.?\d*", path.attrib["d"])]
        across, down = numbers[0::2], numbers[1::2]
        middles = [(min(values) + max(values)) / 2 for values in (across, down)]
        return middles[0], middles[1], max(across) - min(across), path.attrib["style"]


@pytest.fixture
def picture(page: HtmlPage) -> Picture:
    return Picture(page.html)


def test_picture_has_a_text_alternative(picture: Picture) -> None:
    assert picture.root.attrib["role"] == "img"
    labelled_by = picture.root.attrib["aria-labelledby"].split()
    parts = {element.attrib.get("id"): element.text for element in picture.root}
    assert [parts[name] for name in labelled_by] == [
        "Decisions changed against latency, one circle per candidate",
        "openvino int8 quantization=static: 0.24 of eager's latency, the lowest of 3 that passed their gates "
        "(4 dropped). The table has every number.",
    ]


def test_each_circle_says_what_it_is(picture: Picture) -> None:
    titles = [group.findtext("title") for group in picture.root.iter("g") if group.find("title") is not None]
    assert sorted(str(title) for title in titles) == [
        "A: torchscript fp32: pass, 0.85 of eager's latency, 0 % of decisions changed, 88.0 MB",
        "B: onnx-runtime fp32: pass, 0.60 of eager's latency, 0 % of decisions changed, 87.0 MB, compiled in 12 s",
        "C: openvino int8 quantization=static: pass, 0.24 of eager's latency, 1 % of decisions changed, 22.0 MB, "
        "compiled in 13 s",
        "D: aot-inductor fp32: fail, 0.24 of eager's latency, 40 % of decisions changed, 80.0 MB",
        "E: onnx-runtime int8: warn, 0.22 of eager's latency, 1.2 % of decisions changed, 80.0 MB",
    ]


def test_circles_have_the_page_s_colours_and_dropped_ones_are_hollow(picture: Picture) -> None:
    styles = {label: picture.circle(f"{label}: ")[3] for label in "ABCDE"}
    colours = {label: re.findall(r"var\(--(\w+)\)", style) for label, style in styles.items()}
    assert colours == {
        "A": ["rest", "rest"], "B": ["front", "front"], "C": ["pass", "pass"], "D": ["rest"], "E": ["rest"]
    }  # fmt: skip
    assert all("fill: none" in styles[label] for label in "DE")
    assert not re.search(r"#[0-9a-f]{6}", ElementTree.tostring(picture.root, encoding="unicode"))


def test_circles_stand_where_the_numbers_say() -> None:
    # Latencies of 0.2, 0.6 and 1.0: the second stands in the middle. Losses of 0, 2 and 3 %, sizes of 1 to 4.
    candidates = (
        candidate("a", 0.2, 0.0, size_bytes=10_000_000),
        candidate("b", 0.6, 0.02, size_bytes=40_000_000),
        candidate("c", 1.0, 0.03, size_bytes=40_000_000),
    )
    picture = Picture(scatter(candidates, winner=0, front=(0,), drops=(), description="x") or "")
    (ax, ay, a_width, _), (bx, by, b_width, _), (cx, cy, _, _) = (picture.circle(f"{n}: ") for n in "ABC")
    assert bx - ax == pytest.approx(cx - bx, abs=0.1)
    assert ax < bx
    # SVG counts downwards.
    assert ay - by == pytest.approx((ay - cy) * 2 / 3, abs=0.1)
    assert by < ay
    assert b_width == pytest.approx(2 * a_width, abs=0.1)


def test_a_candidate_beyond_the_axes_stands_at_their_edge_with_its_number() -> None:
    broken = candidate("b", 4.0, 0.4, outcome="fail")
    picture = Picture(scatter((candidate("a"), broken), winner=0, front=(0,), drops=(1,), description="x") or "")
    assert "B (4.00, 40 %)" in picture.texts
    assert "1.0" in picture.texts
    assert "4.0" not in picture.texts


def test_circles_in_one_place_share_a_label() -> None:
    candidates = (candidate("a", 0.5), candidate("b", 0.51), candidate("c", 0.9))
    picture = Picture(scatter(candidates, winner=0, front=(0,), drops=(), description="x") or "")
    assert {"A, B", "C"} <= set(picture.texts)


def test_letters_go_on_after_z() -> None:
    assert [letter(n) for n in (0, 25, 26, 27, 52, 701, 702)] == ["A", "Z", "AA", "AB", "BA", "ZZ", "AAA"]


def test_table_for_a_terminal_has_every_candidate_that_was_tried() -> None:
    comparison = compared()
    assert comparison.comparison_header()[3] == "latency / eager at 1 x 16, 8 x 16"
    assert comparison.comparison_rows() == [
        ("A", "torchscript fp32", "pass", "0.80  0.90", "0 %", "88.0 MB", "500.0 MB", "-", ""),
        ("B", "onnx-runtime fp32", "pass", "0.40  0.90", "0 %", "87.0 MB", "-", "12.3 s, cached", "front"),
        ("C", WINNER, "pass", "0.20  0.30", "1 %", "22.0 MB", "-", "13.0 s", "chosen"),
        ("D", "aot-inductor fp32", "fail", "0.30  0.20", "40 %", "80.0 MB", "-", "-", "dropped"),
        ("E", "onnx-runtime int8", "warn", "0.20  0.25", "1.2 %", "80.0 MB", "-", "-", "dropped"),
        ("G", "tensorrt fp32", "error", "-  -", "-", "-", "-", "-", "dropped"),
    ]  # fmt: skip
    assert len(comparison.comparison_header()) == 9


def test_notes_say_why_a_candidate_cannot_be_chosen() -> None:
    assert compared().comparison_notes() == [
        f"dropped: aot-inductor fp32: label_agreement measured 0.6, the limit is at least 0.98; {ATTACK}",
        "dropped: onnx-runtime int8: a warning is not allowed: inconclusive",
        "not tried: neuron fp32: torch-neuron is not installed",
        "dropped: tensorrt fp32: CompileError: out of memory",
    ]


def test_a_long_note_is_shortened() -> None:
    (note,) = compared((candidate("a", outcome="fail", reason="x" * 500),)).comparison_notes()
    assert note == f"dropped: a fp32: {'x' * 157}..."


def test_note_names_the_budget_that_was_exceeded() -> None:
    comparison = compared(max_accuracy_loss=0.005)
    assert (
        "dropped: openvino int8 quantization=static: accuracy loss 1 %, at most 0.5 % is allowed"
        in comparison.comparison_notes()
    )
    assert comparison.comparison_rows()[1][8] == "chosen"


def test_an_allowed_warning_may_win() -> None:
    comparison = compared(allow_warn=True)
    assert comparison.winner == 4
    assert comparison.marks() == ["", "front", "front", "dropped", "chosen", "dropped", "dropped"]


def test_json_round_trips(tmp_path: Path) -> None:
    comparison = compared(goal="size", max_accuracy_loss=0.5)
    write_comparison(comparison, tmp_path)
    assert Comparison.model_validate(json.loads((tmp_path / "comparison.json").read_text("utf-8"))) == comparison


@pytest.mark.parametrize("winner", [-1, 7])
def test_a_winner_that_is_not_a_candidate_is_refused(winner: int) -> None:
    body = compared().model_dump() | {"winner": winner}
    with pytest.raises(ValidationError, match=f"the winner is number {winner} of 7"):
        Comparison.model_validate(body)


def test_latency_of_a_busy_machine_is_marked_in_table_and_page(tmp_path: Path) -> None:
    timed = candidate("openvino", 0.05)
    busy = timed.latencies[0].model_copy(update={"busy": "others used 1.9 of 2 processors", "cpu_ratio": 0.3})
    comparison = compared((timed.model_copy(update={"latencies": (busy,)}), candidate("torchscript", 0.5)))
    rows = comparison.comparison_rows()
    assert [row[3] for row in rows] == ["0.05 (busy machine)", "0.50"]
    page = page_of(comparison, tmp_path)
    assert "busy machine" in page.text
    assert "the processor time of one thread at the first shape takes its place" in page.text
    # The other candidate has no processor time, so only this one can be chosen.
    assert comparison.winner == 0
