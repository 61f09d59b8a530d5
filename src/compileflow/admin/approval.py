"""approval: what a person reads before a version is promoted."""

from __future__ import annotations

import re
from urllib.parse import quote
from uuid import UUID

from compileflow.artifact.verify import last_report
from compileflow.catalog import open_store
from compileflow.contracts import ModelVersion
from compileflow.errors import CompileflowError, IntegrityError, printable
from compileflow.settings import Settings
from compileflow.steps.report_file import read_report
from compileflow.steps.summary import as_code
from compileflow.stores.layout import split_uri
from compileflow.validation.report import Report, fraction, percent

_MOST_FLIPS = 5
# What makes links, pictures, HTML and emphasis. A dot or a dash is harmless within a line.
_MARKS = re.compile(r"[\\`*_\[\]<>!|#]")


def approval_markdown(version: ModelVersion, stage: str, settings: Settings) -> str:
    """Describe a version as Markdown: verdict, changed answers, latency, and where the report is.

    A report that cannot be read is named as such; the registry's own record stays.
    """
    precision = str(version.spec.get("precision", "unknown precision"))
    lines = [
        f"# Promote {_line(version.name)} version {version.version} to {stage}?",
        "",
        f"- verdict: **{version.verdict}**",
        f"- target: {_line(version.target)}, {_line(precision)}",
        f"- source model: {as_code(version.source_uri)} at {as_code(version.source_revision[:12])}",
        f"- in the stage {version.stage}, registered {_line(version.created_at)}",
        f"- artifact: {as_code(version.artifact_digest[:12])}",
    ]
    try:
        report_uri = _report_uri(version, settings)
        report = read_report(report_uri, settings)
        if report.subject.artifact_digest != version.artifact_digest:
            raise IntegrityError("it is about another artifact.")
    except CompileflowError as error:
        lines += ["", f"The report cannot be read: {_line(error.message)}"]
    else:
        lines += [
            # A form is narrow, and text that cannot be broken would make it wider than a phone.
            f"- report: [file in the store]({quote(report_uri, safe='/:@%+=,~')}), "
            "to show with `compileflow inspect`",
            *_run_line(version),
            "",
            f"**{_line(report.verdict.reason)}**",
            "",
            *_flips(report),
            "",
            *_latencies(report),
        ]
    # A registry or a store may have written a line break into a line.
    return "\n".join(map(printable, lines))


def _report_uri(version: ModelVersion, settings: Settings) -> str:
    """Return the URI of the report that the verdict on the artifact names; without a verdict, the registry's.

    Raises:
        CompileflowError: The store does not answer, or a statement was altered.
    """
    digest = last_report(version.artifact_uri, settings)
    if digest is None:
        return version.report_uri
    return open_store(split_uri(version.artifact_uri)[0], settings).folder_uri(digest)


def _run_line(version: ModelVersion) -> list[str]:
    try:
        run = UUID(version.flow_run_id or "")
    except ValueError:
        return []
    return [f"- [the run that registered it](/runs/flow-run/{run}) shows the report as well"]


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
            f"- {_line(latency.shape)} (batch x tokens): source model {latency.reference_p50_ms:.2f} ms, compiled "
            f"{latency.candidate_p50_ms:.2f} ms, ratio {fraction(latency.ratio)}"
        )
    if any(latency.busy for latency in report.latencies):
        lines += ["", "The latency was measured on a busy machine."]
    return lines


def _line(text: str) -> str:
    """Return a text as one line without Markdown."""
    return _MARKS.sub(r"\\\g<0>", " ".join(text.split()))
