"""What a run is asked for: one model that Prefect's form, the API and the command line share."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator
from pydantic.dataclasses import dataclass

from compileflow.catalog import target_names
from compileflow.spec import TARGET_ALIASES, ComponentSpec, HfTask, Objective, Precision, ShapeBucket, TargetName
from compileflow.steps.calibration import CalibrationSettings
from compileflow.validation.settings import ValidationSettings

AUTO = "auto"


def _list_targets(schema: dict[str, Any]) -> None:
    """Put the known targets, third parties' too, into the JSON schema as an enum."""
    schema["enum"] = [AUTO, *target_names(), *TARGET_ALIASES]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class StepSwitches:
    """Which steps do work. One that is off reuses what the store and the registry have.

    A pydantic dataclass, since a BaseModel has attributes of two of these names itself.
    """

    fetch: bool = Field(default=True, title="Fetch", description="Read the source model, pin it and store it.")
    compile: bool = Field(default=True, title="Compile", description="Compile it when it is not cached.")
    validate: bool = Field(
        default=True, title="Validate", description="Compare it with the source model and judge the result."
    )
    register: bool = Field(default=True, title="Register", description="Register it when its verdict allows.")


class StepTimeouts(BaseModel):
    """Seconds after which a step is stopped."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fetch_s: int = Field(3600, ge=1, title="Fetch, seconds", description="Download and storing.")
    compile_s: int = Field(7200, ge=1, title="Compile, seconds", description="All components together.")
    validate_s: int = Field(3600, ge=1, title="Validate, seconds", description="Measuring and judging.")
    register_s: int = Field(300, ge=1, title="Register, seconds", description="The registry's answer.")


class AutoSettings(BaseModel):
    """What target auto tries, and what it chooses by."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    objective: Objective = Field(
        default_factory=Objective, title="Objective", description="What the winner is chosen by."
    )
    targets: tuple[TargetName, ...] = Field(
        (), title="Targets", description="Targets to try. Empty: all that compile and run on the worker."
    )
    precisions: tuple[Precision, ...] = Field(
        (), title="Precisions", description="Precisions to try. Empty: all that a target has."
    )


class CompileRequest(BaseModel):
    """One source model, one target: what to compile, how, and how far to go."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        title="Compile request",
        json_schema_extra={"additionalProperties": False},
    )

    model: str = Field(
        min_length=1,
        title="Model",
        description="A folder on the worker, a Hub id as owner/name, or a registered version: "
        "neptune://workspace/project/ID, mlflow:TRACKING#NAME@VERSION, registry:NAME@VERSION.",
    )
    revision: str | None = Field(
        None, title="Revision", description="Branch, tag or commit of a Hub model. Empty: its main branch."
    )
    target: TargetName = Field(
        "onnx-runtime",
        title="Target",
        description="What the model is compiled for; auto tries all that can, and chooses.",
        json_schema_extra=_list_targets,
    )
    hf_task: HfTask | None = Field(
        None, title="Task", description="Hub task to serve. Empty: read from the model's own architecture."
    )
    precision: Precision = Field(
        Precision.FP32, title="Precision", description="Number format of the compiled model; auto tries its own."
    )
    auto: AutoSettings = Field(
        default_factory=AutoSettings, title="Auto", description="For target auto: what it tries and chooses by."
    )
    max_sequence_length: int | None = Field(
        None, ge=1, title="Maximum sequence length", description="Tokens. Empty: the model's own maximum."
    )
    shape_buckets: tuple[ShapeBucket, ...] = Field(
        (), title="Shape buckets", description="Shapes for static targets. Empty: powers of two, batch 1 and 8."
    )
    components: tuple[ComponentSpec, ...] = Field(
        (),
        title="Components",
        description="Several lengths of one model in one artifact, for example word and document, instead of the "
        "two fields above.",
    )
    target_options: dict[str, JsonValue] = Field(
        default_factory=dict, title="Target options", description="Settings that only this target knows."
    )
    calibration: CalibrationSettings = Field(
        default_factory=CalibrationSettings,
        title="Calibration",
        description="What a static int8 compile looks at.",
    )
    trust_remote_code: bool = Field(
        False, title="Trust remote code", description="Run Python files that come with the model."
    )
    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=128,
        title="Registered name",
        description="Empty: the last part of the model's name.",
    )
    allow_warn: bool = Field(
        False, title="Allow warnings", description="Register a version whose verdict is warn, too."
    )
    validation: ValidationSettings = Field(
        default_factory=ValidationSettings, title="Validation", description="How the result is proven."
    )
    steps: StepSwitches = Field(default_factory=StepSwitches, title="Steps", description="Which steps do work.")
    timeouts: StepTimeouts = Field(
        default_factory=StepTimeouts, title="Timeouts", description="When a step is stopped."
    )
    store_uri: str | None = Field(
        None, title="Artifact store", description="For example s3://bucket/prefix. Empty: as configured."
    )
    registry_uris: tuple[str, ...] = Field(
        (),
        title="Registries",
        description="For example neptune://workspace/project; the first is read. Empty: as configured.",
    )
    aws_credentials_block: str | None = Field(
        None,
        title="AWS credentials",
        description="Name of a Prefect AwsCredentials block for S3. Empty: AWS's own chain.",
    )

    @model_validator(mode="after")
    def _lengths_stand_in_one_place(self) -> CompileRequest:
        if self.components and (self.max_sequence_length is not None or self.shape_buckets):
            raise ValueError(
                "give max_sequence_length and shape_buckets inside components, or leave components out"
            )
        return self
