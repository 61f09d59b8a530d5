"""The compile request: one model that Prefect's form, the API and both command lines share."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from compileflow.errors import SpecError, first_problem
from compileflow.spec import (
    CompileSpec,
    ComponentSpec,
    GraphPrecision,
    HfTask,
    MaxSequenceLength,
    Objective,
    OptionValues,
    Precision,
    RegisteredName,
    ShapeBuckets,
    TargetName,
    TrustRemoteCode,
)
from compileflow.steps.calibration import CalibrationSettings
from compileflow.steps.request_schema import AUTO as AUTO
from compileflow.steps.request_schema import complete_schema, list_targets
from compileflow.validation.settings import ValidationSettings

# Start of a progress line that stays on the terminal.
NOTE = "note: "


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class StepSwitches:
    """Steps that do work. A step that is off reuses what the store and the registry hold.

    The run ends after the last step that is on.

    A pydantic dataclass, because a BaseModel already has attributes named `validate` and `register`.
    """

    fetch: bool = Field(default=True, title="Fetch", description="Read the source model, pin it and store it.")
    compile: bool = Field(default=True, title="Compile", description="Compile the model unless it is cached.")
    validate: bool = Field(
        default=True, title="Validate", description="Compare the artifact with the source model and judge it."
    )
    register: bool = Field(
        default=True, title="Register", description="Register the artifact if its verdict allows."
    )

    @property
    def only_fetch(self) -> bool:
        """Whether the run ends with the stored source model."""
        return self.fetch and not (self.compile or self.validate or self.register)

    @property
    def need_verdict(self) -> bool:
        """Whether the run ends with a verdict: it validates, or it registers what was validated before."""
        return self.validate or self.register


class StepTimeouts(BaseModel):
    """Seconds after which a step is stopped."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fetch_s: int = Field(3600, ge=1, title="Fetch, seconds", description="Limit of download and storing.")
    compile_s: int = Field(7200, ge=1, title="Compile, seconds", description="Limit of all components together.")
    validate_s: int = Field(3600, ge=1, title="Validate, seconds", description="Limit of measuring and judging.")
    tests_s: int = Field(600, ge=1, title="Tests, seconds", description="Limit of your own tests alone.")
    register_s: int = Field(300, ge=1, title="Register, seconds", description="Limit of one registry's answer.")


class AutoSettings(BaseModel):
    """Candidates that target auto tries, and the criterion by which it chooses one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    objective: Objective = Field(
        default_factory=Objective, title="Objective", description="Criterion that chooses the winner."
    )
    targets: tuple[TargetName, ...] = Field(
        (), title="Targets", description="Targets to try. Empty: all that compile and run on the worker."
    )
    precisions: tuple[Precision, ...] = Field(
        (), title="Precisions", description="Precisions to try. Empty: all that the target supports."
    )


class CompileRequest(BaseModel):
    """One source model and one target: what to compile, how to validate it, and where to register it."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        title="Compile request",
        json_schema_extra=complete_schema,
    )

    model: str = Field(
        min_length=1,
        title="Model",
        description="A folder or a GGUF file on the worker, a Hub id (owner/name), or a registered version: "
        "neptune://workspace/project/ID, mlflow:TRACKING#NAME@VERSION, registry:NAME@VERSION.",
    )
    revision: str | None = Field(
        None, title="Revision", description="Branch, tag or commit of a Hub model. Empty: the main branch."
    )
    target: TargetName = Field(
        "onnx-runtime",
        title="Target",
        description="Target that the model is compiled for; auto tries every target and chooses one.",
        json_schema_extra=list_targets,
    )
    hf_task: HfTask | None = Field(
        None,
        title="Task",
        description="Hub task to serve. Empty: the task of the registered version, else detected from the model's "
        "architecture.",
    )
    precision: GraphPrecision = Precision.FP32
    auto: AutoSettings = Field(
        default_factory=AutoSettings, title="Auto", description="Candidates and objective of target auto."
    )
    max_sequence_length: MaxSequenceLength = None
    shape_buckets: ShapeBuckets = ()
    components: tuple[ComponentSpec, ...] = Field(
        (),
        title="Components",
        description="Several maximum lengths of one model in one artifact, for example word and document. They "
        "replace the maximum length and the shape buckets above.",
    )
    target_options: OptionValues = Field(default_factory=dict)
    calibration: CalibrationSettings = Field(
        default_factory=CalibrationSettings, title="Calibration", description="Examples for a static int8 compile."
    )
    trust_remote_code: TrustRemoteCode = False
    name: RegisteredName | None = Field(
        None,
        title="Registered name",
        description="Name in the registry. Empty: the last part of the model's name.",
    )
    allow_warn: bool = Field(
        False, title="Allow warnings", description="Register the version even if its verdict is warn."
    )
    validation: ValidationSettings = Field(
        default_factory=ValidationSettings, title="Validation", description="How the artifact is validated."
    )
    steps: StepSwitches = Field(default_factory=StepSwitches, title="Steps", description="Steps that do work.")
    timeouts: StepTimeouts = Field(
        default_factory=StepTimeouts, title="Timeouts", description="Time limits of the steps."
    )
    store_uri: str | None = Field(
        None, title="Artifact store", description="For example s3://bucket/prefix. Empty: the configured store."
    )
    registry_uris: tuple[str, ...] = Field(
        (),
        title="Registries",
        description="For example neptune://workspace/project. Compileflow reads the first and writes to all. "
        "Empty: the configured registries.",
    )
    aws_credentials_block: str | None = Field(
        None,
        title="AWS credentials",
        description="Name of a Prefect AwsCredentials block for S3. Empty: the default chain of AWS.",
    )

    @model_validator(mode="after")
    def _lengths_stand_in_one_place(self) -> CompileRequest:
        if self.components and (self.max_sequence_length is not None or self.shape_buckets):
            raise ValueError(
                "give max_sequence_length and shape_buckets inside components, or leave components out"
            )
        return self

    def spec_for(self, hf_task: HfTask) -> CompileSpec:
        """Return the part of the request that decides the artifact.

        Args:
            hf_task: Task of the compiled model: the request's, or the one that was detected.

        Raises:
            SpecError: The fields contradict one another.
        """
        default_component = {
            "max_sequence_length": self.max_sequence_length,
            "shape_buckets": self.shape_buckets,
        }
        fields = {name: getattr(self, name) for name in CompileSpec.model_fields}
        fields |= {"hf_task": hf_task, "components": self.components or (default_component,)}
        try:
            return CompileSpec.model_validate(fields)
        except ValidationError as error:
            raise SpecError(f"{first_problem(error)}.", hint="Correct the request.") from error
