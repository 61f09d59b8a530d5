"""The printed outcome of compile runs: a table of results, the candidates of target auto, and log tails."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from compileflow.steps.run import CompileResult

_LOG_LINES = 60
# Without a terminal, rich would cut lines at 80 characters.
_WIDTH = 140


def print_results(results: Sequence[CompileResult]) -> None:
    """Print a table with one row per result, and below it where artifacts, reports and versions are."""
    from compileflow.settings import get_settings
    from compileflow.steps.report_file import export_report
    from compileflow.steps.summary import version_line

    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    for result in results:
        if result.comparison_uri is not None:
            _print_comparison(result.comparison_uri, console)
    table = Table(title="compileflow")
    for column in ("target", "precision", "verdict", "latency / eager", "size", "compile", "registered as"):
        table.add_column(column, overflow="fold")
    for result in results:
        table.add_row(*_row(result))
    console.print(table)
    for result in results:
        lines = [("artifact", result.artifact.uri)]
        if result.validated is not None:
            lines.append(("report", str(export_report(result.validated.report_uri, get_settings()))))
        for uri, version in result.versions.items():
            lines.append(("version", version_line(version, uri)))
        for label, value in lines:
            console.print(f"{result.target} {label}: {value}", soft_wrap=True, highlight=False, markup=False)


def log_tail(log_path: str) -> str:
    """Return the last lines of a toolchain's log, which may have thousands."""
    try:
        lines = Path(log_path).read_text("utf-8", "replace").splitlines()
    except OSError as error:
        return f"{log_path}: {error.strerror}"
    return "\n".join(lines[-_LOG_LINES:])


def _print_comparison(uri: str, console: Console) -> None:
    from compileflow.selection.comparison_file import export_comparison, read_comparison
    from compileflow.settings import get_settings

    comparison = read_comparison(uri)
    table = Table(title="candidates")
    for column in comparison.comparison_header():
        table.add_column(column, overflow="fold")
    for row in comparison.comparison_rows():
        table.add_row(*row)
    console.print(table)
    plot = export_comparison(uri, get_settings())
    for line in (*comparison.comparison_notes(), f"chosen: {comparison.reason}", f"plot: {plot}"):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _row(result: CompileResult) -> tuple[str, ...]:
    figures = result.validated.figures if result.validated else {}
    ratio = figures.get("latency_ratio")
    interval = f"{figures.get('latency_ratio_low', 0):.2f} to {figures.get('latency_ratio_high', 0):.2f}"
    version = result.version
    return (
        result.target,
        result.precision.value,
        result.validated.outcome if result.validated else "not validated",
        f"{ratio:.2f} ({interval})" if ratio else "not timed",
        f"{result.artifact.size_bytes / 1e6:.1f} MB",
        "cached" if result.artifact.cached else f"{result.artifact.compile_duration_s:.1f} s",
        f"{version.name} version {version.version}" if version else "not registered",
    )
