"""Read a stored report: its values, or a page for the browser."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from compileflow._process.folders import file_written_whole, os_errors
from compileflow.catalog import open_store
from compileflow.contracts.json_files import MOST_JSON_BYTES, read_bytes, read_json
from compileflow.errors import ManifestError, first_line, first_problem
from compileflow.settings import Settings
from compileflow.stores.layout import split_uri
from compileflow.validation.bundle import BUNDLE_FOLDER, copy_bundle
from compileflow.validation.report import DATA_DOCS_FOLDER, DATA_DOCS_PAGE, REPORT_HTML, REPORT_JSON, Report

# The pages of this package have their styles and pictures inside, and no script. A browser would let a script of a
# local file read other files. A later policy in the page can only forbid more.
_PAGE_START = b"""<!doctype html>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
"""
Kind = TypeVar("Kind", bound=BaseModel)


def export_report(report_uri: str, settings: Settings) -> Path:
    """Copy report.html out of the store to HOME/reports, and beside it the Data Docs if there are any.

    Returns:
        The path of the page.

    Raises:
        ManifestError: The URI does not name a report.
        IntegrityError: The report is absent or altered.
    """
    return export_page(report_uri, REPORT_HTML, settings)


def read_report(report_uri: str, settings: Settings | None = None) -> Report:
    """Read report.json out of the store. Raises as `export_report` does."""
    return read_values(Report, report_uri, REPORT_JSON, settings)


def read_report_file(path: Path) -> Report:
    """Read the JSON file of a report, wherever it is.

    Raises:
        ManifestError: The file cannot be read, or is not a report.
    """
    try:
        return Report.model_validate(read_json(path))
    except (OSError, ValueError) as error:
        problem = first_problem(error) if isinstance(error, ValidationError) else first_line(error)
        raise ManifestError(
            f"{path} is not a report: {problem}.", hint="Give the report.json of a validation, or an artifact."
        ) from error


def read_values(kind: type[Kind], uri: str, name: str, settings: Settings | None) -> Kind:
    """Read the JSON file `name` of a stored folder as a `kind`. Raises as `export_report` does."""
    store_uri, digest = split_uri(uri)
    with open_store(store_uri, settings).open_folder(digest) as folder:
        return _parsed(kind, _member(folder, name, uri), uri)


def export_page(uri: str, name: str, settings: Settings) -> Path:
    """Copy the page `name` of a stored folder to HOME/reports and return its path.

    The copy cannot run a script or load anything, even if another program wrote the page into the store.
    """
    store_uri, digest = split_uri(uri)
    page = settings.home_dir / "reports" / f"{digest[:12]}.html"
    with open_store(store_uri, settings).open_folder(digest) as folder, os_errors(page, "write to"):
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_bytes(_PAGE_START + _member(folder, name, uri))
        docs = folder / DATA_DOCS_FOLDER / DATA_DOCS_PAGE
        if docs.is_file():
            copied = _data_docs_of(page)
            copied.parent.mkdir(exist_ok=True)
            copied.write_bytes(_PAGE_START + _member(docs.parent, docs.name, uri))
    return page


def export_picture(report_uri: str, settings: Settings) -> Path:
    """Draw the outcome of a report into HOME/reports, unless an earlier run has drawn it, and return its path.

    Raises:
        ManifestError: The URI does not name a report.
        IntegrityError: The report is absent or altered.
        ImportError: The extra validation, which draws, is not installed.
    """
    picture = settings.home_dir / "reports" / f"{split_uri(report_uri)[1][:12]}.png"
    if not picture.exists():
        from compileflow.validation.report.outcome_picture import outcome_picture

        drawn = outcome_picture(read_report(report_uri, settings))
        with os_errors(picture, "write to"), file_written_whole(picture) as partial:
            partial.write_bytes(drawn)
    return picture


def export_bundle(report_uri: str, settings: Settings) -> Path | None:
    """Copy the bundle of a failed validation to HOME/reports and return its folder; None if the report has none.

    Only data comes out of the store; this package writes the script. Raises as `export_report` does.
    """
    store_uri, digest = split_uri(report_uri)
    bundle = settings.home_dir / "reports" / f"{digest[:12]}-{BUNDLE_FOLDER}"
    with open_store(store_uri, settings).open_folder(digest) as folder, os_errors(bundle, "write to"):
        if not (folder / BUNDLE_FOLDER).is_dir():
            return None
        if bundle.exists():
            # An earlier version copied all files of the bundle.
            shutil.rmtree(bundle)
        bundle.parent.mkdir(parents=True, exist_ok=True)
        copy_bundle(folder / BUNDLE_FOLDER, bundle)
    return bundle


def data_docs_beside(page: Path) -> Path | None:
    """Return the Data Docs that `export_report` has copied beside the page of a report; None without any."""
    docs = _data_docs_of(page)
    return docs if docs.is_file() else None


def _data_docs_of(page: Path) -> Path:
    return page.with_name(f"{page.stem}-{DATA_DOCS_FOLDER}") / DATA_DOCS_PAGE


def _parsed(kind: type[Kind], body: bytes, uri: str) -> Kind:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise ManifestError(
            f"{uri} cannot be read: {first_problem(error)}.",
            hint="Read it with the version of compileflow that wrote it.",
        ) from error


def _member(folder: Path, name: str, uri: str) -> bytes:
    try:
        return read_bytes(folder / name, most_bytes=MOST_JSON_BYTES, follow_links=True)
    except FileNotFoundError as error:
        raise ManifestError(
            f"{uri} is not a report: it has no {name}.", hint="Give the URI of a report."
        ) from error
    except ValueError as error:
        raise ManifestError(
            f"{uri} is not a report: {name}: {error}.", hint="Validate the artifact again."
        ) from error
