"""approval: what a person reads before a version is promoted."""

from __future__ import annotations

from compileflow.contracts import ModelVersion
from compileflow.errors import CompileflowError, printable
from compileflow.settings import Settings
from compileflow.steps.report_file import read_report
from compileflow.validation.report import Report, fraction, percent

_MOST_FLIPS = 5


def approval_markdown(version: ModelVersion, stage: str, settings: Settings) -> str:
    """Describe a version as Markdown: verdict, changed answers, latency, and where the report is.

    A report that cannot be read is named as such; the registry's own record stays.
    """
    lines = [
        f"# Promote {version.name} version {version.version} to {stage}?",
        "",
        f"- verdict: **{version.verdict}**",
        f"- target: {version.target}, {version.spec.get('precision', 'unknown precision')}",
        f"- source model: `{version.source_uri}` at `{version.source_revision[:12]}`",
        f"- in the stage {version.stage}, registered {version.created_at}",
        f"- artifact: `{version.artifact_digest[:12]}`",
        # A form is narrow, and text that cannot be broken would make it wider than a phone.
        f"- report: [file in the store]({version.report_uri}), to show with `compileflow inspect`",
    ]
    if version.flow_run_id:
        lines.append(
            f"- [the run that registered it](/runs/flow-run/{version.flow_run_id}) shows the report as well"
        )
    try:
        report = read_report(version.report_uri, settings)
    except CompileflowError as error:
        lines += ["", f"The report cannot be read: {error.message}"]
    else:
        lines += ["", f"**{report.verdict.reason}**", "", *_flips(report), "", *_latencies(report)]
    # A registry or a store may have written a line break into a line.
    return "\n".join(map(printable, lines))


def _flips(report: Report) -> list[str]:
    count = report.flips_count
    lines = ["## Changed answers", "", f"{count} of the answers to {report.examples_count} examples changed.", ""]
    # A table would make the form wider than a phone.
    for flip in report.flips[:_MOST_FLIPS]:
        margin = "" if flip.margin is None else f", margin {percent(flip.margin)}"
        lines.append(f"- {_line(flip.text)}: {_line(flip.before)}, now {_line(flip.after)}{margin}")
    return lines


def _latencies(report: Report) -> list[str]:
    lines = ["## Latency", ""]
    if not report.latencies:
        return [*lines, "Not measured."]
    for latency in report.latencies:
        lines.append(
            f"- {latency.shape} (batch x tokens): source model {latency.reference_p50_ms:.2f} ms, compiled "
            f"{latency.candidate_p50_ms:.2f} ms, ratio {fraction(latency.ratio)}"
        )
    if any(latency.busy for latency in report.latencies):
        lines += ["", "The latency was measured on a busy machine."]
    return lines


def _line(text: str) -> str:
    """Return a text as one line."""
    return " ".join(text.split())
