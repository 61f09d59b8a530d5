"""Report: the result of a validation, as JSON and as a page that opens offline."""

from __future__ import annotations

from compileflow.validation.report.data_docs import DATA_DOCS_FOLDER, DATA_DOCS_PAGE, write_data_docs
from compileflow.validation.report.page import fraction, megabytes, percent, write_page
from compileflow.validation.report.report import (
    REPORT_HTML,
    REPORT_JSON,
    TEST_FILES_FOLDER,
    Report,
    ReportSubject,
    environment,
    worst_rows,
    write_report,
)

__all__ = [
    "DATA_DOCS_FOLDER",
    "DATA_DOCS_PAGE",
    "REPORT_HTML",
    "REPORT_JSON",
    "TEST_FILES_FOLDER",
    "Report",
    "ReportSubject",
    "environment",
    "fraction",
    "megabytes",
    "percent",
    "worst_rows",
    "write_data_docs",
    "write_page",
    "write_report",
]
