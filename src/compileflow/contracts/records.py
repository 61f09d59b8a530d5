"""Records of the manifest that targets and runners read: tensors and components."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue

from compileflow.contracts.digests import safe_relative_path
from compileflow.spec import Precision, ShapeBucket

Axis = Literal["batch", "sequence", "frames"] | int


class Record(BaseModel):
    """Base of the manifest's records: frozen, and unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorRecord(Record):
    """One input or output of a graph."""

    name: str
    dtype: str = Field(description="NumPy name, for example int64.")
    axes: tuple[Axis, ...] = Field(
        description="'batch', 'sequence', 'frames' (what convolutions make of a sequence), or a fixed size."
    )


class ComponentRecord(Record):
    """One compiled graph: its interface, its shapes, and where its files are."""

    folder: Annotated[str, AfterValidator(safe_relative_path)] = Field(
        description="Relative to the manifest; components of one graph share it."
    )
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    output_class: str = Field(description="The source model's output class, as module:Class.")
    max_sequence_length: int = Field(ge=1, description="Tokens, or what else a row has; images: 1.")
    dynamic_axes: bool = Field(description="False: only the shape buckets run.")
    shape_buckets: tuple[ShapeBucket, ...] = ()
    pad_token_id: int = Field(0, description="Fills input_ids beyond a row's end.")
    precision: Precision = Field(
        Precision.FP32, description="What the graph computes in; its outputs are float32."
    )
    load_options: dict[str, JsonValue] = Field(
        default_factory=dict, description="What the target has to know again when it loads."
    )
    frame_convolutions: tuple[tuple[int, int], ...] = Field(
        (), description="(kernel, stride) of each convolution between the sequence and its frames."
    )
