"""Data Docs: the results of Great Expectations as it renders them, on one page that opens offline."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

DATA_DOCS_FOLDER, DATA_DOCS_PAGE = "data_docs", "index.html"
_PACKAGE = "compileflow.validation.report"


def write_data_docs(judged: Sequence[tuple[str, Any]], folder: Path) -> None:
    """Write the page into a new folder.

    Great Expectations renders the tables. Its own frame of the page loads styles, scripts and pictures from the
    internet; ours has a style of its own and loads nothing.

    Args:
        judged: Validation results with a title for each.
        folder: Folder to make.
    """
    from great_expectations.render.renderer.page_renderer import ValidationResultsPageRenderer
    from great_expectations.render.view import DefaultJinjaPageView
    from markupsafe import Markup

    renderer = ValidationResultsPageRenderer()
    with warnings.catch_warnings():
        # As where the gates are judged, these come from inside great_expectations.
        warnings.simplefilter("ignore")
        results = [
            # The first section links to pages that do not exist here.
            {
                "title": title,
                "statistics": result.statistics,
                "sections": renderer.render(result).to_json_dict()["sections"][1:],
            }
            for title, result in judged
        ]
    template, style = ((files(_PACKAGE) / name).read_text("utf-8") for name in ("data_docs.html.j2", "page.css"))
    page = DefaultJinjaPageView().env.from_string(template)
    folder.mkdir()
    # The style is this package's own file, and escaping would break its quotes.
    text = page.render(results=results, style=Markup(style))  # noqa: S704
    (folder / DATA_DOCS_PAGE).write_text(text, "utf-8")
