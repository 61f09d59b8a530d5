"""Data Docs: the results as Great Expectations renders them, offline, and only if requested."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from compileflow.spec import HfTask, Precision
from compileflow.steps.report_file import data_docs_beside, export_report
from compileflow.validation.judge import judge
from compileflow.validation.report import DATA_DOCS_PAGE, write_data_docs
from tests.conftest import ModelFactory
from tests.steps import Pipeline
from tests.unit.html_page import HtmlPage
from tests.unit.test_judge import comparison, healthy
from tests.unit.test_user_suite import ELEMENT, suite

CLASSIFY = HfTask.TEXT_CLASSIFICATION
ATTACK = "<script>alert('x')</script> $says"


def assert_offline(html: str) -> HtmlPage:
    """Assert that the page loads nothing, and that its links stay on it."""
    page = HtmlPage(html)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(page.tags)
    assert not {"src", "srcset", "data", "onclick"} & {name for name, _ in page.attributes}
    assert all((value or "").startswith("#") for name, value in page.attributes if name == "href")
    assert not re.search(r"https?://|@import|url\(", html)
    return page


def test_the_page_shows_every_gate_and_loads_nothing(tmp_path: Path) -> None:
    measured = healthy()
    measured.comparisons.append(comparison([1.4, -1.0]))
    # A gate that raises shows its exception.
    del measured.scalars["confident_flips"]
    judged: list[tuple[str, Any]] = []
    verdict = judge(
        measured,
        precision=Precision.FP32,
        hf_task=CLASSIFY,
        user_suite=suite(ELEMENT | {"says": ATTACK}),
        on_result=lambda title, result: judged.append((title, result)),
    )
    write_data_docs(judged, tmp_path / "docs")
    html = (tmp_path / "docs" / DATA_DOCS_PAGE).read_text("utf-8")
    page = assert_offline(html)
    for gate in verdict.gates:
        assert f"{gate.gate}: {gate.says}; the limit is {gate.comparison} {gate.limit:.4g}" in page.text
    titles = [
        "regression, comparisons: ",
        "regression, rates: 1 of 1 hold",
        "our-service, comparisons: 0 of 1 hold",
    ]
    assert all(title in page.text for title in titles)
    assert "no rows to judge" in page.text
    assert "fa-check-circle" in html
    assert "fa-times" in html


@pytest.mark.slow
def test_data_docs_stand_beside_the_report_that_requested_them(
    pipeline: Pipeline, tiny_model: ModelFactory
) -> None:
    request = pipeline.request(tiny_model(CLASSIFY), validation={"latency_pairs": 5, "data_docs": True})
    artifact = pipeline.compile(request)
    validated = pipeline.validate(request, artifact)
    page = data_docs_beside(export_report(validated.report_uri, pipeline.settings))
    assert page is not None
    assert "component default, suite regression, comparisons: " in assert_offline(page.read_text("utf-8")).text
    assert pipeline.validate(request, artifact).cached
