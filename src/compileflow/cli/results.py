"""The printed outcome of compile runs: a table of results, the candidates of target auto, and log tails."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compileflow.cli.tables import output_console, print_lines, print_table

if TYPE_CHECKING:
    from compileflow.steps.run import CompileResult
    from compileflow.steps.values import CompiledArtifact

_LOG_LINES = 60
_HEADER = ("target", "precision", "verdict", "latency / eager", "size", "compile", "registered as")


def print_results(results: Sequence[CompileResult]) -> None:
    """Print a table with one row per result, and below it where artifacts, reports and versions are."""
    from compileflow.settings import get_settings
    from compileflow.steps.report_file import data_docs_beside, export_report
    from compileflow.steps.summary import label_scores, version_line

    console = output_console()
    for result in results:
        if result.comparison_uri is not None:
            _print_comparison(result.comparison_uri)
    print_table(_HEADER, [_row(result) for result in results], title="compileflow", optional=("compile", "size"))
    for result in results:
        lines = [("source model", result.source.stored_uri)]
        if result.artifact is not None:
            lines = [("artifact", result.artifact.uri)]
        if result.validated is not None:
            lines += [("labels", score) for score in label_scores(result.validated.figures)]
            page = export_report(result.validated.report_uri, get_settings())
            lines.append(("report", str(page)))
            if docs := data_docs_beside(page):
                lines.append(("data docs", str(docs)))
        for uri, version in result.versions.items():
            lines.append(("version", version_line(version, uri)))
        print_lines(console, *(f"{result.target} {label}: {value}" for label, value in lines))


def log_tail(log_path: str) -> str:
    """Return the last lines of a toolchain's log, which may have thousands."""
    try:
        lines = Path(log_path).read_text("utf-8", "replace").splitlines()
    except OSError as error:
        return f"{log_path}: {error.strerror}"
    return "\n".join(lines[-_LOG_LINES:])


def _print_comparison(uri: str) -> None:
    from compileflow.selection.comparison_file import export_comparison, read_comparison
    from compileflow.settings import get_settings

    comparison = read_comparison(uri)
    print_table(
        comparison.comparison_header(),
        comparison.comparison_rows(),
        title="candidates",
        optional=("compile", "memory", "size"),
    )
    plot = export_comparison(uri, get_settings())
    notes = (*comparison.comparison_notes(), f"chosen: {comparison.reason}", f"plot: {plot}")
    print_lines(output_console(), *notes)


def _row(result: CompileResult) -> tuple[str, ...]:
    from compileflow.contracts import LATENCY_ON_BUSY_MACHINE
    from compileflow.validation.report import fraction

    figures = result.validated.figures if result.validated else {}
    ratio = figures.get("latency_ratio")
    interval = " to ".join(fraction(figures.get(f"latency_ratio_{end}", 0.0)) for end in ("low", "high"))
    speed = f"{fraction(ratio)} ({interval})" if ratio else "not timed"
    if LATENCY_ON_BUSY_MACHINE in figures:
        speed = "busy machine"
    version, artifact = result.version, result.artifact
    return (
        result.target,
        result.precision.value,
        result.validated.outcome if result.validated else "not validated",
        speed,
        f"{artifact.size_bytes / 1e6:.1f} MB" if artifact else "",
        _compile_time(artifact) if artifact else "not compiled",
        f"{version.name} version {version.version}" if version else "not registered",
    )


def _compile_time(artifact: CompiledArtifact) -> str:
    return "cached" if artifact.cached else f"{artifact.compile_duration_s:.1f} s"
