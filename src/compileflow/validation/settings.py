"""Settings of a validation that the user chooses. suites/regression.yaml holds the limits of the gates."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from compileflow.spec import ShapeBucket


class ValidationSettings(BaseModel):
    """Settings of one validation. They are part of its cache key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    examples_path: str | None = Field(
        None,
        min_length=1,
        title="Examples",
        description="Your natural examples, with or without labels: a text file with one example per line, JSON "
        "lines or CSV with text, or with question and context, or a folder of images or 16-bit WAV files. Empty: "
        "the 320 sentences or 300 questions that come with compileflow, or generated images and recordings.",
    )
    suite_path: str | None = Field(
        None,
        min_length=1,
        title="Your suite",
        description="YAML file with gates of your own, in the form of compileflow's suite file. They are judged "
        "in addition to compileflow's gates. Empty: none.",
    )
    tests_path: str | None = Field(
        None,
        min_length=1,
        title="Your tests",
        description="Folder on the worker with pytest tests of your own. A test that fails blocks the model. They "
        "run with the rights of the worker. Empty: none.",
    )
    data_docs: bool = Field(
        False,
        title="Data Docs",
        description="Write the page of Great Expectations beside the report. It takes some seconds.",
    )
    max_examples: int = Field(
        400, ge=1, le=100_000, title="Most examples", description="Maximum number of natural examples to compare."
    )
    strict: bool = Field(
        False,
        title="Strict",
        description="Pass only if the compiled model changes at most 0.1 % of the decisions where 1 % is allowed, "
        "with 95 % confidence. About 2,700 examples without a change show that.",
    )
    max_latency_ratio: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        title="Latency gate",
        description="Maximum of the compiled model's median latency as a fraction of eager's. Empty: no gate.",
    )
    latency_shapes: tuple[ShapeBucket, ...] = Field(
        (),
        title="Latency shapes",
        description="Batch sizes and lengths to time both models at; the report quotes the first. Empty: "
        "1 x 16, 1 x 128 and 8 x 128, as far as the model's maximum length allows.",
    )
    latency_pairs: int = Field(
        30,
        ge=5,
        le=10_000,
        title="Latency pairs",
        description="Number of interleaved pairs of calls to time per shape.",
    )
