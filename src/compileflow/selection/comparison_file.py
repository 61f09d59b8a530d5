"""Read a comparison from the store: its values, or its page for a browser."""

from __future__ import annotations

from pathlib import Path

from compileflow.selection.comparison import COMPARISON_HTML, COMPARISON_JSON, Comparison
from compileflow.settings import Settings
from compileflow.steps.report_file import export_page, read_values


def export_comparison(comparison_uri: str, settings: Settings) -> Path:
    """Copy comparison.html out of the store to HOME/reports and return its path.

    Raises:
        ManifestError: The URI does not belong to a comparison.
        IntegrityError: The comparison is absent or altered.
    """
    return export_page(comparison_uri, COMPARISON_HTML, settings)


def read_comparison(comparison_uri: str, settings: Settings | None = None) -> Comparison:
    """Read comparison.json from the store.

    Raises:
        ManifestError: The URI does not belong to a comparison.
        IntegrityError: The comparison is absent or altered.
    """
    return read_values(Comparison, comparison_uri, COMPARISON_JSON, settings)
