"""Records of the manifest that targets and runners read: components and their tensors."""

from __future__ import annotations

from math import prod
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, JsonValue, model_validator

from compileflow.contracts.digests import safe_relative_path
from compileflow.errors import LoadError
from compileflow.spec import LONGEST_SEQUENCE, Precision, ShapeBucket

# Implementation of attention in transformers.
Attention = Literal["sdpa", "eager"]
# Side on which a row may be padded without changing its answer; none where padding on any side changes it.
Padding = Literal["right", "left", "none"]
Axis = Literal["batch", "sequence", "frames", "height", "width", "free"] | Annotated[int, Field(ge=1, le=2**31)]


# One gibibyte of floats.
_MOST_ELEMENTS = 2**28


class Record(BaseModel):
    """Base class of the manifest's records: immutable, without unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorRecord(Record):
    """One input or output of a compiled graph."""

    name: str = Field(min_length=1, max_length=200)
    dtype: str = Field(
        pattern=r"^(bool|u?int(8|16|32|64)|float(16|32|64))$",
        description="Name of the NumPy type, for example int64.",
    )
    axes: tuple[Axis, ...] = Field(
        max_length=8,
        description="Per axis: 'batch', 'sequence', 'frames' (a sequence after convolutions), 'height' and "
        "'width' of an image, 'free' (another size that follows from the inputs), or a fixed size.",
    )
    below: int | None = Field(
        None, ge=1, description="Values are at least 0 and below this number, for example token types; null: any."
    )


def _different_names(records: tuple[TensorRecord, ...]) -> tuple[TensorRecord, ...]:
    if len({record.name for record in records}) != len(records):
        raise ValueError("two tensors share a name")
    return records


Tensors = Annotated[
    tuple[TensorRecord, ...], FailFast(), Field(min_length=1, max_length=1000), AfterValidator(_different_names)
]
ConvolutionSize = Annotated[int, Field(ge=1, le=LONGEST_SEQUENCE)]


class ComponentRecord(Record):
    """One component of an artifact: the interface of its compiled graph, its shapes, and its folder."""

    folder: Annotated[str, AfterValidator(safe_relative_path)] = Field(
        description="Relative to the manifest. Components with the same graph share a folder."
    )
    inputs: Tensors
    outputs: Tensors
    output_class: str = Field(max_length=500, description="Output class of the source model, as module:Class.")
    max_sequence_length: int = Field(
        ge=1, le=LONGEST_SEQUENCE, description="Longest row, in tokens or audio samples; 1 for images."
    )
    dynamic_axes: bool = Field(description="Whether any shape runs. False: only the shape buckets run.")
    shape_buckets: Annotated[tuple[ShapeBucket, ...], FailFast()] = ()
    pad_token_id: int = Field(0, ge=0, lt=2**31, description="Token that pads input_ids after the end of a row.")
    precision: Precision = Field(
        Precision.FP32, description="Number format of the computation. Outputs are always float32."
    )
    load_options: dict[str, JsonValue] = Field(
        default_factory=dict, description="Values that the target needs for a load."
    )
    frame_convolutions: Annotated[tuple[tuple[ConvolutionSize, ConvolutionSize], ...], FailFast()] = Field(
        (), max_length=100, description="(kernel, stride) of each convolution that turns the sequence into frames."
    )
    padding: Padding | None = Field(
        None,
        description="Side on which padding leaves the answer to a row of tokens unchanged; 'none' where it never "
        "does. null where it was not measured, as in older manifests.",
    )
    vocab_size: int = Field(
        0,
        ge=0,
        description="Number of token ids that the model takes; 0 where any number is a token id, or unknown.",
    )
    attention: str = Field(
        "",
        description="Implementation of attention in transformers that the graph was made from; empty if unknown.",
    )

    def load_option(self, name: str) -> JsonValue:
        """Return a value that the target needs for a load.

        Raises:
            LoadError: The manifest lacks it.
        """
        if name not in self.load_options:
            raise LoadError(
                f"load_options of the manifest lacks the entry {name!r}, which the target needs.",
                hint="Fetch the artifact again, or compile the model again.",
            )
        return self.load_options[name]

    @model_validator(mode="after")
    def _longest_bucket_is_the_maximum(self) -> Self:
        longest = max((bucket.sequence_length for bucket in self.shape_buckets), default=0)
        if not self.dynamic_axes and longest != self.max_sequence_length:
            raise ValueError(
                f"the longest shape bucket has the length {longest}, but max_sequence_length is "
                f"{self.max_sequence_length}"
            )
        return self

    @model_validator(mode="after")
    def _model_takes_the_pad_token(self) -> Self:
        if self.pad_token_id >= self.vocab_size > 0:
            raise ValueError(
                f"pad_token_id is {self.pad_token_id}, but the model takes token ids below {self.vocab_size}"
            )
        return self

    @model_validator(mode="after")
    def _fits_in_memory(self) -> Self:
        longest = max((bucket.batch_size * bucket.sequence_length for bucket in self.shape_buckets), default=1)
        for tensor in self.inputs:
            elements = longest * prod(axis for axis in tensor.axes if isinstance(axis, int))
            if elements > _MOST_ELEMENTS:
                raise ValueError(
                    f"an input has at most {_MOST_ELEMENTS} elements, got {elements} for {tensor.name}"
                )
        return self
