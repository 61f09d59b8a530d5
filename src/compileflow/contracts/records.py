"""Records of the manifest that targets and runners read: components and their tensors."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue

from compileflow.contracts.digests import safe_relative_path
from compileflow.spec import Precision, ShapeBucket

Axis = Literal["batch", "sequence", "frames"] | int


class Record(BaseModel):
    """Base class of the manifest's records: immutable, without unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorRecord(Record):
    """One input or output of a compiled graph."""

    name: str
    dtype: str = Field(description="Name of the NumPy type, for example int64.")
    axes: tuple[Axis, ...] = Field(
        description="Per axis: 'batch', 'sequence', 'frames' (a sequence after convolutions), or a fixed size."
    )


class ComponentRecord(Record):
    """One component of an artifact: the interface of its compiled graph, its shapes, and its folder."""

    folder: Annotated[str, AfterValidator(safe_relative_path)] = Field(
        description="Relative to the manifest. Components with the same graph share a folder."
    )
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    output_class: str = Field(description="Output class of the source model, as module:Class.")
    max_sequence_length: int = Field(ge=1, description="Longest row, in tokens or audio samples; 1 for images.")
    dynamic_axes: bool = Field(description="Whether any shape runs. False: only the shape buckets run.")
    shape_buckets: tuple[ShapeBucket, ...] = ()
    pad_token_id: int = Field(0, description="Token that pads input_ids after the end of a row.")
    precision: Precision = Field(
        Precision.FP32, description="Number format of the computation. Outputs are always float32."
    )
    load_options: dict[str, JsonValue] = Field(
        default_factory=dict, description="Values that the target needs for a load."
    )
    frame_convolutions: tuple[tuple[int, int], ...] = Field(
        (), description="(kernel, stride) of each convolution that turns the sequence into frames."
    )
