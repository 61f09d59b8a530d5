"""The values that steps pass on: URIs, digests and figures, but no local paths and no tensors."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from compileflow.contracts import SHA256, Outcome
from compileflow.spec import HfTask


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FetchedSource(_Value):
    """A source model in the artifact store."""

    uri: str = Field(description="Origin of the model: hf://owner/name, file:///folder, neptune://...")
    revision: str = Field(description="Commit of a Hub model, or digest of a folder.")
    stored_uri: str
    digest: str = Field(pattern=SHA256)
    size_bytes: int
    cached: bool = Field(description="True if the store already had the model.")
    hf_task: HfTask | None = Field(None, description="Task on the model card.")
    test_files_digest: str | None = Field(
        None,
        pattern=SHA256,
        description="Digest of the stored folder with the registered inputs, parameters and predictions.",
    )


class CompiledArtifact(_Value):
    """A compiled model in the artifact store. It is unproven until a report names its digest."""

    uri: str
    digest: str = Field(pattern=SHA256)
    cache_key: str = Field(pattern=SHA256)
    size_bytes: int
    compile_duration_s: float
    peak_rss_bytes: int
    cached: bool
    why: str = Field(description="Why it was compiled, or why it was cached.")


class ValidatedArtifact(_Value):
    """The verdict on an artifact, and its report in the artifact store."""

    artifact_digest: str = Field(pattern=SHA256)
    report_uri: str
    report_digest: str = Field(pattern=SHA256)
    outcome: Outcome
    reason: str
    figures: dict[str, float]
    cached: bool
    why: str


def all_figures(artifact: CompiledArtifact, validated: ValidatedArtifact) -> dict[str, float]:
    """Return the figures of a run: those of the validation and those of the compile."""
    return validated.figures | {
        "size_bytes": float(artifact.size_bytes),
        "compile_duration_s": artifact.compile_duration_s,
        "peak_rss_bytes": float(artifact.peak_rss_bytes),
    }
