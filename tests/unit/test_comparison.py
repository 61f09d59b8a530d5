"""The comparison's page, table, picture and JSON: all candidates in them, the winner named, nothing loaded."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from compileflow.selection.choice import choose, pareto_front
from compileflow.selection.comparison import Candidate, Comparison, Objective, plot_text, write_comparison
from compileflow.selection.pareto import key, scatter
from compileflow.spec import HfTask
from tests.unit.test_choice import candidate

ATTACK = "<script>alert('x')</script> & \"more\""

CANDIDATES = (
    candidate("torchscript", (0.8, 0.9), size_bytes=86_000_000, serving_memory_bytes=500_000_000),
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
    candidate("tensorrt", None, None, outcome="error", reason="CompileError: no", size_bytes=None),
)


def compared(
    candidates: tuple[Candidate, ...] = CANDIDATES, *, allow_warn: bool = False, **objective: Any
) -> Comparison:
    wanted = Objective(**objective)
    winner, reason = choose(candidates, wanted, allow_warn=allow_warn)
    return Comparison(
        source_uri="hf://owner/model",
        source_revision="abc123",
        source_digest="1" * 64,
        hf_task=HfTask.TEXT_CLASSIFICATION,
        objective=wanted,
        allow_warn=allow_warn,
        candidates=candidates,
        winner=winner,
        reason=reason,
        environment={"machine": "x86_64", "torch": "2.13.0"},
    )


@pytest.fixture
def html(tmp_path: Path) -> str:
    return page_of(compared(), tmp_path)


def page_of(comparison: Comparison, folder: Path) -> str:
    write_comparison(comparison, folder)
    return (folder / "comparison.html").read_text("utf-8")


class _Page(HTMLParser):
    """Collects tags, attributes and text as a browser would."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.extend(attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_loads_nothing(html: str) -> None:
    page = _Page(html)
    assert not {"script", "link", "img", "image", "use", "iframe", "object", "embed", "base"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert not {"src", "href", "xlink:href", "srcset", "data", "action", "onclick"} & names
    assert not re.search(r"https?://|src\s*=|rel\s*=|@import|url\(", html)
    assert html.rstrip().endswith("</html>")
    assert "{{" not in html
    assert "{%" not in html


def test_html_leads_with_the_winner_and_why(html: str) -> None:
    text = _Page(html).text
    body = text[text.index("7 candidates for hf://owner/model\n") :]
    assert body.index("openvino int8 quantization=static") < body.index("0.24 of eager's latency, the lowest of 3")
    assert body.index("the lowest of 3") < body.index("torchscript")
    assert "(4 dropped)" in body
    assert html.count('class="mark chosen"') == 1
    chosen = html[html.index('<tbody class="is-pass chosen">') :]
    assert "openvino int8 quantization=static" in chosen[: chosen.index("</tbody>")]


def test_html_shows_every_candidate_with_its_numbers_and_why_it_was_dropped(html: str) -> None:
    rows = [_Page(row).text for row in re.findall(r"<tbody.*?</tbody>", html, re.DOTALL)]
    assert len(rows) == len(CANDIDATES)
    for position, (one, row) in enumerate(zip(CANDIDATES, rows, strict=True)):
        assert row.startswith(key(position))
        assert one.label in row
        assert one.outcome in row
        for latency in one.latencies:
            assert f"{latency.ratio:.2f}{latency.latency_p50_ms:.2f} ms" in re.sub(r"\n", "", row)
        assert ("dropped: " in row) is (one.outcome != "pass")
        assert one.reason.removeprefix(f"{one.outcome}: ") in row
    assert "12.3 s, cached" in rows[1]
    assert "500.0 MB" in rows[0]
    assert "front" in rows[1]
    assert "1 %" in rows[2]


def test_html_says_where_everything_is_and_what_it_was_measured_on(html: str) -> None:
    text = _Page(html).text
    for part in ("hf://owner/model", "abc123", "1" * 64, "torch 2.13.0", "text-classification"):
        assert part in text
    for part in (CANDIDATES[2].artifact_uri, CANDIDATES[2].report_uri):
        assert part in text


def test_names_and_reasons_are_shown_and_never_run(tmp_path: Path) -> None:
    bad = candidate(ATTACK, 0.1, 0.0, reason=ATTACK, artifact_uri=ATTACK, options={ATTACK: ATTACK})
    html = page_of(compared((bad, *CANDIDATES)).model_copy(update={"source_uri": ATTACK}), tmp_path)
    assert "<script" not in html
    assert _Page(html).text.count(ATTACK) >= 6


def test_html_without_a_winner_says_so(tmp_path: Path) -> None:
    html = page_of(compared(max_size_bytes=10), tmp_path)
    text = _Page(html).text
    assert "none chosen" in text
    assert "None of 7 candidates is left" in text
    assert 'class="verdict is-fail"' in html
    assert "size 22.0 MB, at most 0.0 MB is allowed" in text


def test_html_of_candidates_that_were_never_timed_has_no_picture(tmp_path: Path) -> None:
    html = page_of(compared(CANDIDATES[5:]), tmp_path)
    assert "<svg" not in html
    assert "tensorrt fp32" in html


def test_picture_has_a_circle_and_a_title_for_each_that_was_measured(html: str) -> None:
    svg = html[html.index("<svg") : html.index("</svg>")]
    assert 'role="img"' in svg
    assert svg.count("<circle") == 5
    titles = re.findall(r"<g><title>(.*?)</title>", svg)
    assert len(titles) == 5
    winner = next(title for title in titles if title.startswith("openvino"))
    assert winner == (
        "openvino int8 quantization=static: pass, 0.24 of eager&#39;s latency, 1 % of decisions changed, "
        "22.0 MB, compiled in 13 s"
    )
    assert svg.count('class="dot chosen"') == 1
    assert svg.count('class="dot dropped"') == 2


def test_picture_stands_where_the_numbers_say() -> None:
    comparison = compared()
    front = pareto_front(comparison.candidates)
    picture = scatter(comparison.candidates, winner=2, front=front, dropped={3, 4})
    dots = {dot.key: dot for dot in picture.dots}
    assert {name: dot.kind for name, dot in dots.items()} == {
        "A": "passed",
        "B": "front",
        "C": "chosen",
        "D": "dropped",
        "E": "dropped",
    } | ({"A": "front"} if 0 in front else {})
    # Without any loss: on the floor. Half as wide is a quarter of the area.
    assert dots["A"].spot.y == dots["B"].spot.y == picture.floor_y
    area = (dots["C"].spot.radius / dots["B"].spot.radius) ** 2
    assert area == pytest.approx(22 / 87, rel=0.02)
    across = {name: dot.spot.x - picture.left for name, dot in dots.items()}
    assert across["A"] / across["B"] == pytest.approx(0.72**0.5 / 0.6, rel=0.01)
    assert picture.eager_x - picture.left == pytest.approx(across["B"] / 0.6, rel=0.01)
    # Far beyond what the others need, so at the edge, with its number.
    assert dots["D"].spot.y == picture.top
    assert dots["D"].spot.text == "aot-inductor fp32 (40 %)"
    points = [float(pair.split(",")[0]) for pair in picture.front.split()]
    assert points == sorted(points)
    assert len(points) == sum(n in front for n in range(5))


def test_rows_for_a_terminal_say_everything_in_short() -> None:
    comparison = compared()
    header, rows = comparison.comparison_header(), comparison.comparison_rows()
    assert header[3] == "latency / eager at 1 x 16, 8 x 16"
    assert {len(row) for row in rows} == {len(header)}
    assert rows[2] == (
        "C",
        "openvino int8 quantization=static",
        "pass",
        "0.20  0.30",
        "1 %",
        "22.0 MB",
        "-",
        "13.0 s",
        "chosen",
    )
    assert rows[1][7:] == ("12.3 s, cached", "front")
    assert [row[8] for row in rows[3:5]] == ["dropped", "dropped"]
    assert "neuron fp32" not in {row[1] for row in rows}


def test_notes_say_why_each_of_the_others_cannot_be_chosen() -> None:
    notes = compared().comparison_notes()
    assert notes[0].startswith("dropped: aot-inductor fp32: label_agreement measured 0.6")
    assert notes[1].endswith(": a warning is not allowed: inconclusive")
    assert notes[2] == "not tried: neuron fp32: torch-neuron is not installed"
    assert max(map(len, notes)) <= 220


def test_note_names_the_budget_that_was_exceeded() -> None:
    comparison = compared(max_accuracy_loss=0.005)
    assert any(
        line.endswith(": accuracy loss 1 %, at most 0.5 % is allowed") for line in comparison.comparison_notes()
    )
    assert comparison.comparison_rows()[1][8] == "chosen"


def test_an_allowed_warning_may_win() -> None:
    comparison = compared(allow_warn=True)
    assert comparison.winner == 4
    assert comparison.marks()[4] == "chosen"
    assert 4 not in comparison.dropped()


def test_text_picture_keeps_to_its_size_and_has_a_letter_for_each_row() -> None:
    picture = plot_text(compared(), width=72, height=16).splitlines()
    assert len(picture) == 16
    assert max(map(len, picture)) <= 72
    cells = "".join(line[8:] for line in picture[1:13])
    # Small letters were dropped; F and G were never timed.
    assert sorted(re.sub(r"\s", "", cells)) == ["A", "B", "C", "d", "e"]
    assert picture[12].lstrip().startswith("0 % |")
    assert "latency as a fraction of eager" in picture[15]
    # Without loss at the bottom, the wrong one at the top, faster to the left.
    assert "A" in picture[12]
    assert picture[12].index("B") < picture[12].index("A")
    assert "d" in picture[1]


@pytest.mark.parametrize(("width", "height"), [(40, 8), (72, 16), (120, 30)])
def test_text_picture_has_a_star_where_letters_hide_one_another(width: int, height: int) -> None:
    equals = tuple(candidate(f"target{n}", 0.5, 0.0) for n in range(30))
    lines = plot_text(compared(equals), width=width, height=height).splitlines()
    assert max(map(len, lines[:height])) <= width
    assert lines[height - 4].split("|")[1].strip() == "EC*BD"


def test_text_picture_has_room_for_its_last_tick() -> None:
    # 1.08 times the slowest is a tick itself, at the very edge.
    picture = plot_text(compared((candidate("slow", 2.5 / 1.08, 0.0),)), width=72).splitlines()[:16]
    assert picture[14].endswith("2.5")
    assert max(map(len, picture)) <= 72


def test_json_round_trips(tmp_path: Path) -> None:
    comparison = compared(goal="size", max_accuracy_loss=0.5)
    write_comparison(comparison, tmp_path)
    assert Comparison.model_validate(json.loads((tmp_path / "comparison.json").read_text("utf-8"))) == comparison


@pytest.mark.parametrize("winner", [-1, 7])
def test_a_winner_that_is_no_candidate_is_refused(winner: int) -> None:
    body = compared().model_dump() | {"winner": winner}
    with pytest.raises(ValidationError, match=f"the winner is number {winner} of 7"):
        Comparison.model_validate(body)
