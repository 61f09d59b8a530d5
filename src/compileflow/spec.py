"""The compile specification: tasks, precisions, shapes, and what decides one compiled artifact.

A field that several models share is an annotated type, declared once with its constraint, title and description.
Each model lists its fields in its own order, because that order is part of a file format.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    JsonValue,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

# Names that older specs use for a target.
TARGET_ALIASES: Mapping[str, str] = {"generic": "torchscript"}
TargetName = Annotated[str, AfterValidator(lambda name: TARGET_ALIASES.get(name, name))]
# Targets for AWS Neuron; Inf1 first, because services wrote their tracing settings for it.
NEURON_TARGETS = ("neuron", "neuronx")
# Other names of tasks in transformers (transformers.pipelines.TASK_ALIASES).
TASK_ALIASES: Mapping[str, str] = {"sentiment-analysis": "text-classification", "ner": "token-classification"}
# Ten minutes of audio at 16,000 samples per second are 9,600,000.
LONGEST_SEQUENCE = 10_000_000
_MOST_ELEMENTS = 2**26
Goal = Literal["latency", "throughput", "size"]
Modality = Literal["text", "image", "audio", "image-text"]
# Library whose pipeline answers a task; None where neither has one.
PipelineOwner = Literal["transformers", "compileflow"] | None


class HfTask(StrEnum):
    """Tasks of the Hugging Face Hub that a compiled model can serve."""

    FEATURE_EXTRACTION = "feature-extraction"
    SENTENCE_SIMILARITY = "sentence-similarity"
    TEXT_CLASSIFICATION = "text-classification"
    ZERO_SHOT_CLASSIFICATION = "zero-shot-classification"
    TOKEN_CLASSIFICATION = "token-classification"  # noqa: S105 - a task's name, not a password
    FILL_MASK = "fill-mask"
    QUESTION_ANSWERING = "question-answering"
    MULTIPLE_CHOICE = "multiple-choice"
    TEXT_RANKING = "text-ranking"
    TEXT_GENERATION = "text-generation"
    IMAGE_CLASSIFICATION = "image-classification"
    ZERO_SHOT_IMAGE_CLASSIFICATION = "zero-shot-image-classification"
    IMAGE_FEATURE_EXTRACTION = "image-feature-extraction"
    IMAGE_SEGMENTATION = "image-segmentation"
    OBJECT_DETECTION = "object-detection"
    DEPTH_ESTIMATION = "depth-estimation"
    AUDIO_CLASSIFICATION = "audio-classification"
    AUDIO_FRAME_CLASSIFICATION = "audio-frame-classification"
    AUDIO_XVECTOR = "audio-xvector"
    SPEECH_RECOGNITION = "automatic-speech-recognition"

    @classmethod
    def _missing_(cls, value: object) -> HfTask | None:
        """Accept the aliases of transformers, for example HfTask("ner")."""
        return cls(TASK_ALIASES[value]) if isinstance(value, str) and value in TASK_ALIASES else None

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """List the aliases, because forms and the API of Prefect refuse values that the schema does not list."""
        json_schema = handler(schema)
        handler.resolve_ref_schema(json_schema)["enum"] = [*(task.value for task in cls), *TASK_ALIASES]
        return json_schema

    @property
    def graph_task(self) -> HfTask:
        """The task that has the same graph: some tasks differ only in how they process the outputs."""
        return _SAME_GRAPH.get(self, self)

    @property
    def modality(self) -> Modality:
        """Kind of the graph's inputs: text, image, audio, or one image with several texts."""
        return _MODALITIES.get(self, "text")

    @property
    def takes_text(self) -> bool:
        """Whether the graph takes tokens."""
        return self.modality in ("text", "image-text")

    @property
    def reads_pairs(self) -> bool:
        """Whether a row of the graph holds two texts, such as a question and a document."""
        return self in _PAIR_TASKS

    @property
    def generates(self) -> bool:
        """Whether a call of the model goes on until the answer ends, token by token, with what it has read."""
        return self is HfTask.TEXT_GENERATION

    @property
    def pipeline_owner(self) -> PipelineOwner:
        """Library whose pipeline answers the task: transformers, compileflow where it lacks one, or none."""
        return _PIPELINE_OWNERS.get(self, "transformers")


_SAME_GRAPH = {
    HfTask.SENTENCE_SIMILARITY: HfTask.FEATURE_EXTRACTION,
    HfTask.ZERO_SHOT_CLASSIFICATION: HfTask.TEXT_CLASSIFICATION,
    HfTask.TEXT_RANKING: HfTask.TEXT_CLASSIFICATION,
}
_PAIR_TASKS = (HfTask.QUESTION_ANSWERING, HfTask.MULTIPLE_CHOICE, HfTask.TEXT_RANKING)
_MODALITIES: Mapping[HfTask, Modality] = {
    HfTask.IMAGE_CLASSIFICATION: "image",
    HfTask.ZERO_SHOT_IMAGE_CLASSIFICATION: "image-text",
    HfTask.IMAGE_FEATURE_EXTRACTION: "image",
    HfTask.IMAGE_SEGMENTATION: "image",
    HfTask.OBJECT_DETECTION: "image",
    HfTask.DEPTH_ESTIMATION: "image",
    HfTask.AUDIO_CLASSIFICATION: "audio",
    HfTask.AUDIO_FRAME_CLASSIFICATION: "audio",
    HfTask.AUDIO_XVECTOR: "audio",
    HfTask.SPEECH_RECOGNITION: "audio",
}
_PIPELINE_OWNERS: Mapping[HfTask, PipelineOwner] = {
    HfTask.SENTENCE_SIMILARITY: "compileflow",
    HfTask.QUESTION_ANSWERING: "compileflow",
    HfTask.MULTIPLE_CHOICE: None,
    HfTask.TEXT_RANKING: "compileflow",
    HfTask.AUDIO_FRAME_CLASSIFICATION: None,
    HfTask.AUDIO_XVECTOR: None,
}
# Text tasks whose graph answers in one call. Targets of third parties name them.
TEXT_TASKS = tuple(task for task in HfTask if task.modality == "text" and not task.generates)
# One task per graph.
GRAPH_TASKS = tuple(task for task in HfTask if task.graph_task is task)


class Precision(StrEnum):
    """Number format that the compiled model computes in."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    INT8 = "int8"
    INT4 = "int4"

    @property
    def is_integer(self) -> bool:
        """Whether weights are stored as integers with scales."""
        return self in (Precision.INT8, Precision.INT4)


class ShapeBucket(BaseModel):
    """One fixed input shape that a static graph is compiled for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch_size: int = Field(ge=1, le=4096, title="Batch size", description="Rows per call.")
    sequence_length: int = Field(
        ge=1,
        le=LONGEST_SEQUENCE,
        title="Sequence length",
        description="Tokens in a row; samples for audio; 1 for images.",
    )

    @model_validator(mode="after")
    def _fits_in_memory(self) -> ShapeBucket:
        if self.batch_size * self.sequence_length > _MOST_ELEMENTS:
            raise ValueError(f"a shape bucket has at most {_MOST_ELEMENTS} elements, got {self}")
        return self

    def __str__(self) -> str:
        return f"{self.batch_size}x{self.sequence_length}"


MaxSequenceLength = Annotated[
    int | None,
    Field(
        ge=1,
        le=LONGEST_SEQUENCE,
        title="Maximum sequence length",
        description="Longest row, in tokens (with special tokens) or audio samples. Empty: the model's maximum; "
        "for audio, 30 seconds.",
    ),
]
ShapeBuckets = Annotated[
    tuple[ShapeBucket, ...],
    Field(
        title="Shape buckets",
        description="Shapes that a target without dynamic axes compiles. Empty: powers of two, batch 1 and 8.",
    ),
]
GraphPrecision = Annotated[
    Precision,
    Field(title="Precision", description="Number format of the compiled graph. Target auto tries its own list."),
]
OptionValues = Annotated[
    dict[str, JsonValue],
    Field(title="Target options", description="Options of the target, by name."),
]
TrustRemoteCode = Annotated[
    bool,
    Field(
        title="Trust remote code",
        description="Run Python files that come with the source model. They run with your rights.",
    ),
]


def _name_rule(pattern: str, words: str) -> tuple[object, ...]:
    """Return the parts of an annotated name whose error says in words what the pattern allows."""

    def check(name: str) -> str:
        if re.fullmatch(pattern, name) is None:
            raise ValueError(f"expected {words}, the first one a letter or a digit")
        return name

    return AfterValidator(check), Field(json_schema_extra={"pattern": pattern})


ComponentName = Annotated[
    str, *_name_rule(r"^[a-z0-9][a-z0-9_-]*$", "lower-case letters, digits, underscores and hyphens")
]
RegisteredName = Annotated[
    str,
    Field(max_length=128),
    *_name_rule(r"^[A-Za-z0-9][A-Za-z0-9._-]*$", "letters, digits, dots, underscores and hyphens"),
]


class ComponentSpec(BaseModel):
    """A named maximum length and its shape buckets; all components share one graph."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ComponentName = Field("default", title="Name", description="Name of the component.")
    max_sequence_length: MaxSequenceLength = None
    shape_buckets: ShapeBuckets = ()

    @model_validator(mode="after")
    def _buckets_fit(self) -> ComponentSpec:
        longest = self.longest_bucket
        if longest is not None and self.max_sequence_length not in (None, longest):
            raise ValueError(
                f"component {self.name!r}: the longest shape bucket is {longest} tokens, "
                f"max_sequence_length is {self.max_sequence_length}; make them equal or give only one"
            )
        return self

    @property
    def longest_bucket(self) -> int | None:
        """Sequence length of the longest shape bucket, None without buckets."""
        return max((bucket.sequence_length for bucket in self.shape_buckets), default=None)


class CompileSpec(BaseModel):
    """Everything that the user decides about one compiled artifact; each field is part of its cache key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: TargetName = Field(title="Target", description="Target that the model is compiled for.")
    hf_task: HfTask = Field(title="Task", description="Hub task that the compiled model serves.")
    precision: GraphPrecision = Precision.FP32
    components: tuple[ComponentSpec, ...] = Field(
        (ComponentSpec(),),
        min_length=1,
        title="Components",
        description="Named maximum lengths and their shape buckets; they share one graph.",
    )
    target_options: OptionValues = Field(default_factory=dict)
    trust_remote_code: TrustRemoteCode = False

    @model_validator(mode="after")
    def _names_differ(self) -> CompileSpec:
        names = [component.name for component in self.components]
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            raise ValueError(f"two components have the name {repeated!r}; rename one of them")
        return self


class Objective(BaseModel):
    """Criterion by which target auto chooses a candidate, and the budget of that candidate."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    goal: Goal = Field(
        "latency",
        title="Goal",
        description="latency: the lowest latency as a fraction of eager. throughput: the most rows, or written "
        "tokens, per second. size: the smallest artifact.",
    )
    max_accuracy_loss: float | None = Field(
        None,
        ge=0,
        le=1,
        title="Accuracy loss at most",
        description="Share of decisions that may change, 0 to 1. Empty: only the gates decide.",
    )
    max_serving_memory_bytes: int | None = Field(
        None,
        ge=1,
        title="Serving memory at most",
        description="Bytes at the peak of calls at the timed shapes. Empty: no limit.",
    )
    max_size_bytes: int | None = Field(
        None, ge=1, title="Size at most", description="Bytes of the artifact. Empty: no limit."
    )

    @property
    def has_budget(self) -> bool:
        """Whether a limit besides the gates is set."""
        return (self.max_accuracy_loss, self.max_serving_memory_bytes, self.max_size_bytes) != (None,) * 3
