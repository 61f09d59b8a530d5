"""The outcome of a run as text: Markdown, a table of figures, and one line for each step."""

from __future__ import annotations

from collections.abc import Mapping

from compileflow.contracts import LATENCY_ON_BUSY_MACHINE, ModelVersion, without_credentials
from compileflow.steps.values import CompiledArtifact, FetchedSource, ValidatedArtifact, all_figures
from compileflow.validation.report import megabytes


def summary_markdown(source: FetchedSource, artifact: CompiledArtifact, validated: ValidatedArtifact) -> str:
    """Return the outcome as Markdown."""
    ratio = validated.figures.get("latency_ratio")
    speed = f"{1 / ratio:.2f} times as fast as eager" if ratio else "not timed"
    if LATENCY_ON_BUSY_MACHINE in validated.figures:
        speed = "not used, because it was measured on a busy machine"
    return "\n".join(
        (
            f"# {validated.outcome}: {source.uri}",
            "",
            f"**{validated.reason}**",
            "",
            f"- source model: `{source.uri}` at `{source.revision}`",
            f"- artifact: `{artifact.uri}` ({megabytes(artifact.size_bytes)}; {compile_words(artifact)})",
            *(f"- labels: {score}" for score in label_scores(validated.figures)),
            f"- latency of one short text: {speed}",
            f"- report: `{validated.report_uri}`",
        )
    )


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
