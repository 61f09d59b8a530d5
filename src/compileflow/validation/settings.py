"""What the user decides about a validation."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from compileflow.spec import ShapeBucket


class ValidationSettings(BaseModel):
    """Settings of one validation; part of its cache key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    examples_path: str | None = Field(
        None,
        title="Examples",
        description="Your own natural examples: a text file, one a line, or JSON lines with text, or question "
        "and context; a folder of images or 16-bit WAV files. Empty: the 320 sentences and 300 questions that "
        "compileflow carries, or signals that it generates.",
    )
    max_examples: int = Field(
        400, ge=1, le=100_000, title="Examples at most", description="Natural examples that are compared."
    )
    max_latency_ratio: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        title="Latency gate",
        description="Highest median latency of the compiled model as a fraction of eager's. Empty: no gate.",
    )
    latency_shapes: tuple[ShapeBucket, ...] = Field(
        (),
        title="Latency shapes",
        description="Batch sizes and lengths that both models are timed at; the first is the headline. Empty: "
        "1 x 16, 1 x 128 and 8 x 128, as far as the model has positions.",
    )
    latency_pairs: int = Field(
        30, ge=5, le=10_000, title="Latency pairs", description="Interleaved pairs of calls a shape."
    )
