"""The outcome of a run as text: Markdown, a table of figures, and one line for each step."""

from __future__ import annotations

from collections.abc import Mapping

from compileflow.contracts import ModelVersion, without_credentials
from compileflow.errors import printable
from compileflow.steps.values import CompiledArtifact, FetchedSource, ValidatedArtifact, all_figures
from compileflow.validation.report import Report, fraction, megabytes


def summary_markdown(
    source: FetchedSource, artifact: CompiledArtifact, validated: ValidatedArtifact, *, report: Report, page: str
) -> str:
    """Return the outcome as Markdown, the verdict first.

    Args:
        source: Source model.
        artifact: Compiled model.
        validated: Verdict and figures.
        report: Report of the validation.
        page: URL of the report's page.
    """
    return "\n".join(
        printable(line)
        for line in (
            f"# {validated.reason}",
            "",
            f"- source model: {as_code(source.uri)} at {as_code(source.revision[:12])}",
            f"- artifact: `{artifact.digest[:12]}` ({megabytes(artifact.size_bytes)}; {compile_words(artifact)})",
            f"- changed answers: {report.flips_count} of {report.examples_count} examples",
            *(f"- labels: {score}" for score in label_scores(validated.figures)),
            f"- report: {as_code(page)} on the worker",
            "",
            *_latency_lines(report),
        )
    )


def as_code(text: str) -> str:
    """Return a text as Markdown's code, in which nothing is a link or a picture."""
    return f"`{text.replace('`', chr(39))}`"


def _latency_lines(report: Report) -> list[str]:
    """Return a table of the latencies, and what a busy machine means for them."""
    if not report.latencies:
        return ["The latency was not measured."]
    lines = ["| shape | eager, ms | compiled, ms | fraction of eager |", "|---|---|---|---|"]
    for latency in report.latencies:
        times = f"{latency.reference_p50_ms:.3g} | {latency.candidate_p50_ms:.3g}"
        lines.append(f"| {latency.shape} | {times} | {fraction(latency.ratio)} |")
    if any(latency.busy for latency in report.latencies):
        lines += ["", "The latency is not used, because it was measured on a busy machine."]
    return lines


def label_scores(figures: Mapping[str, float]) -> list[str]:
    """Return the score of both models on the labels of the examples, as one line; [] without labels."""
    suffix = "_of_source_model"
    return [
        f"{name.removesuffix(suffix).replace('_', ' ')} {figures[name.removesuffix(suffix)]:.4f}, source model "
        f"{figures[name]:.4f}, on {figures['labelled_examples']:.0f} labelled examples"
        for name in figures
        if name.endswith(suffix) and "labelled_examples" in figures
    ]


def figures_table(artifact: CompiledArtifact, validated: ValidatedArtifact) -> list[dict[str, str]]:
    """Return one row for each figure of a run."""
    figures = all_figures(artifact, validated)
    return [{"figure": name, "value": f"{value:.6g}"} for name, value in sorted(figures.items())]


def compile_words(artifact: CompiledArtifact) -> str:
    """Describe how the artifact came about: from the cache, or by a compile."""
    if artifact.cached:
        return f"cached, {artifact.why}"
    return f"compiled in {artifact.compile_duration_s:.1f} s, {artifact.why}"


def source_line(source: FetchedSource) -> str:
    """Describe a fetched source model in one line."""
    return f"source model {source.uri} at {source.revision[:12]}{' (cached)' if source.cached else ''}"


def artifact_line(artifact: CompiledArtifact) -> str:
    """Describe a compiled artifact in one line."""
    return f"artifact {artifact.digest[:12]}: {compile_words(artifact)}"


def verdict_line(validated: ValidatedArtifact) -> str:
    """Describe a verdict in one line."""
    return f"verdict {validated.reason}{' (cached)' if validated.cached else ''}"


def version_line(version: ModelVersion, registry_uri: str) -> str:
    """Describe a registered version in one line."""
    return f"{version.name} version {version.version} in {without_credentials(registry_uri)}"
