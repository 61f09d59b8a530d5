"""Take a report or a comparison out of the store, as a file that a browser opens or as its values."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from compileflow.catalog import open_store
from compileflow.errors import ManifestError, first_line
from compileflow.loading.artifacts import split_uri
from compileflow.settings import Settings
from compileflow.validation.comparison import COMPARISON_HTML, COMPARISON_JSON, Comparison
from compileflow.validation.report import REPORT_HTML, REPORT_JSON, Report
from compileflow.workspace import os_errors

Kind = TypeVar("Kind", bound=BaseModel)


def export_report(report_uri: str, settings: Settings) -> Path:
    """Copy report.html out of the store to HOME/reports and return its path.

    Raises:
        ManifestError: the URI is not a report's.
        IntegrityError: the report is absent or altered.
    """
    return _export(report_uri, REPORT_HTML, settings)


def export_comparison(comparison_uri: str, settings: Settings) -> Path:
    """Copy comparison.html out of the store to HOME/reports and return its path.

    Raises as `export_report` does.
    """
    return _export(comparison_uri, COMPARISON_HTML, settings)


def read_report(report_uri: str, settings: Settings | None = None) -> Report:
    """Read report.json out of the store. Raises as `export_report` does."""
    store_uri, digest = split_uri(report_uri)
    with open_store(store_uri, settings).open_folder(digest) as folder:
        return _parsed(Report, _member(folder, REPORT_JSON, report_uri), report_uri)


def read_comparison(comparison_uri: str, settings: Settings | None = None) -> Comparison:
    """Read comparison.json out of the store. Raises as `export_report` does."""
    store_uri, digest = split_uri(comparison_uri)
    with open_store(store_uri, settings).open_folder(digest) as folder:
        return _parsed(Comparison, _member(folder, COMPARISON_JSON, comparison_uri), comparison_uri)


def _export(uri: str, name: str, settings: Settings) -> Path:
    store_uri, digest = split_uri(uri)
    out = settings.home_dir / "reports" / f"{digest[:12]}.html"
    with open_store(store_uri, settings).open_folder(digest) as folder, os_errors(out, "write to"):
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(_member(folder, name, uri))
    return out


def _parsed(kind: type[Kind], body: bytes, uri: str) -> Kind:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise ManifestError(
            f"{uri} cannot be read: {first_line(error)}.", hint="Read it with the compileflow that wrote it."
        ) from error


def _member(folder: Path, name: str, uri: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except FileNotFoundError as error:
        raise ManifestError(f"{uri} is no report.", hint="Give a report's URI.") from error
