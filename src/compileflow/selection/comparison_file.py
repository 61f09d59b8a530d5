"""Read a comparison from the store: its values, or a page that a browser opens."""

from __future__ import annotations

from pathlib import Path

from compileflow.selection.comparison import COMPARISON_HTML, COMPARISON_JSON, Comparison
from compileflow.settings import Settings
from compileflow.steps.report_file import export_page, read_values


def export_comparison(comparison_uri: str, settings: Settings) -> Path:
    """Copy comparison.html out of the store to HOME/reports and return its path.

    Raises as `export_report` does.
    """
    return export_page(comparison_uri, COMPARISON_HTML, settings)


def read_comparison(comparison_uri: str, settings: Settings | None = None) -> Comparison:
    """Read comparison.json out of the store. Raises as `export_comparison` does."""
    return read_values(Comparison, comparison_uri, COMPARISON_JSON, settings)
