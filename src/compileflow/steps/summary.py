"""The outcome of a run in words and figures, for people."""

from __future__ import annotations

from compileflow.steps.values import CompiledArtifact, FetchedSource, ValidatedArtifact
from compileflow.validation.report import megabytes


def summary_markdown(source: FetchedSource, artifact: CompiledArtifact, validated: ValidatedArtifact) -> str:
    """Return the outcome as Markdown."""
    ratio = validated.figures.get("latency_ratio")
    speed = f"{1 / ratio:.2f} times as fast as eager" if ratio else "not timed"
    return "\n".join(
        (
            f"# {validated.outcome}: {source.uri}",
            "",
            f"**{validated.reason}**",
            "",
            f"- source model: `{source.uri}` at `{source.revision}`",
            f"- artifact: `{artifact.uri}` ({megabytes(artifact.size_bytes)}; {compile_words(artifact)})",
            f"- latency of one short text: {speed}",
            f"- report: `{validated.report_uri}`",
        )
    )


def figures_table(artifact: CompiledArtifact, validated: ValidatedArtifact) -> list[dict[str, str]]:
    """Return the key figures, a row each."""
    figures = validated.figures | {
        "size_bytes": float(artifact.size_bytes),
        "compile_duration_s": artifact.compile_duration_s,
        "peak_rss_bytes": float(artifact.peak_rss_bytes),
    }
    return [{"figure": name, "value": f"{value:.6g}"} for name, value in sorted(figures.items())]


def compile_words(artifact: CompiledArtifact) -> str:
    """Say whether it was compiled now."""
    if artifact.cached:
        return f"cached, {artifact.why}"
    return f"compiled in {artifact.compile_duration_s:.1f} s, {artifact.why}"
