"""The small, durable values that pass between steps: URIs, digests and figures, never a path or a tensor."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from compileflow.contracts import SHA256, Outcome
from compileflow.spec import HfTask


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FetchedSource(_Value):
    """A source model in the artifact store."""

    uri: str = Field(description="Where it came from: hf://owner/name, file:///folder, neptune://...")
    revision: str = Field(description="Hub commit, or the folder's own digest.")
    stored_uri: str
    digest: str = Field(pattern=SHA256)
    size_bytes: int
    cached: bool = Field(description="True: nothing had to be downloaded or copied.")
    hf_task: HfTask | None = Field(None, description="What its model card says it serves.")
    test_files_digest: str | None = Field(
        None,
        pattern=SHA256,
        description="Its registered inputs, parameters and predictions, a folder in the store.",
    )


class CompiledArtifact(_Value):
    """A compiled model in the artifact store. Worth nothing until a report points at its digest."""

    uri: str
    digest: str = Field(pattern=SHA256)
    cache_key: str = Field(pattern=SHA256)
    size_bytes: int
    compile_duration_s: float
    peak_rss_bytes: int
    cached: bool
    why: str = Field(description="Why it was compiled, or where it was found.")


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
