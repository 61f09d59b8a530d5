"""What a target must be able to do, and the values that it exchanges with its caller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, JsonValue

from compileflow.contracts.records import ComponentRecord, TensorRecord
from compileflow.spec import CompileSpec, ComponentSpec, HfTask, Precision, ShapeBucket

Arrays = dict[str, NDArray[Any]]
Device = Literal["cpu", "cuda", "neuron", "lpu"]


@dataclass(frozen=True)
class Availability:
    """Whether a target can compile and run on this machine, and if not, why and what to do.

    Attributes:
        can_compile: The toolchain is here.
        can_run: The runtime, and the device that it needs, are here.
        reason: What is missing, when either is False.
        hint: What to do about it.
        lacking: Precisions of the target that this machine cannot run, each with the reason.
    """

    can_compile: bool
    can_run: bool
    reason: str = ""
    hint: str = ""
    lacking: Mapping[Precision, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Capabilities:
    """What a target can do on any machine.

    Attributes:
        hf_tasks: Tasks that it compiles.
        precisions: Number formats that it has.
        devices: Where the result runs; the first is the default.
        dynamic_axes: True: any shape runs. False: only the shape buckets do.
        compile_needs_device: True: without the device there is no compile.
        variants: For a precision, the sets of options that `auto` tries; where none is named, the defaults alone.
        runtime: Distributions that running needs, each with the versions (PEP 440) that load what one of its
            versions compiled. Of a compile with 2.13.1, {major}, {minor} and {release} are 2, 2.13 and 2.13.1,
            and {next_major} is 3. Those that are not named are not checked.
        runtime_install: Command that installs such versions; {} stands for the requirements.
    """

    hf_tasks: tuple[HfTask, ...]
    precisions: tuple[Precision, ...]
    devices: tuple[Device, ...]
    dynamic_axes: bool
    compile_needs_device: bool = False
    variants: Mapping[Precision, tuple[Mapping[str, JsonValue], ...]] = field(default_factory=dict)
    runtime: Mapping[str, str] = field(default_factory=dict)
    runtime_install: str = "pip install {}"


@dataclass(frozen=True)
class ComponentPlan:
    """One component with its shapes resolved: the input of `Target.compile`.

    Attributes:
        spec: Specification of the whole artifact.
        component: The component, with its maximum length set, and its shape buckets if the target needs them.
        threads: Threads that the compile may use.
        calibration: Natural batches, arrays of the graph's inputs; () unless the target's options say
            `needs_calibration`.
    """

    spec: CompileSpec
    component: ComponentSpec
    threads: int = 1
    calibration: tuple[Arrays, ...] = ()

    def __post_init__(self) -> None:
        if self.component.max_sequence_length is None:
            raise ValueError(f"component {self.component.name!r} of a plan has no max_sequence_length")

    @property
    def name(self) -> str:
        """Name of the component."""
        return self.component.name

    @property
    def hf_task(self) -> HfTask:
        """Hub task that the compiled model serves."""
        return self.spec.hf_task

    @property
    def precision(self) -> Precision:
        """Number format of the compiled graph."""
        return self.spec.precision

    @property
    def max_sequence_length(self) -> int:
        """Longest row, in tokens or audio samples."""
        assert self.component.max_sequence_length is not None  # noqa: S101 - __post_init__ refuses None
        return self.component.max_sequence_length

    @property
    def shape_buckets(self) -> tuple[ShapeBucket, ...]:
        """Shapes to compile; () if the target has dynamic axes."""
        return self.component.shape_buckets

    @property
    def options(self) -> Mapping[str, JsonValue]:
        """Target options of the specification, by name."""
        return self.spec.target_options

    @property
    def trust_remote_code(self) -> bool:
        """Whether Python files of the source model may run."""
        return self.spec.trust_remote_code


@dataclass(frozen=True)
class CompiledComponent:
    """What `Target.compile` wrote: its files relative to `out_dir`, and the graph's interface.

    Outputs are float32 at every precision. `load_options` come back to `Target.load` in the component's record.
    """

    files: tuple[str, ...]
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    output_class: str
    pad_token_id: int
    load_options: Mapping[str, JsonValue] = field(default_factory=dict)
    frame_convolutions: tuple[tuple[int, int], ...] = ()


class Runner(Protocol):
    """A loaded graph. Safe to call from several threads."""

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """Map named inputs to named outputs; shapes as in the component's record."""

    def close(self) -> None:
        """Release the graph. Closing twice does nothing."""


class TargetOptions(BaseModel):
    """Base of every target's options: frozen, and unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def needs_calibration(self, precision: Precision) -> bool:
        """Say whether a compile at this precision looks at natural examples."""
        return False


@runtime_checkable
class Target(Protocol):
    """One thing that a model can be compiled for. Methods import their toolchain themselves."""

    name: ClassVar[str]
    version: ClassVar[int]
    summary: ClassVar[str]
    Options: ClassVar[type[TargetOptions]]
    capabilities: ClassVar[Capabilities]

    def probe(self) -> Availability:
        """Look whether the toolchain is here. Never raises, imports nothing heavy."""

    def toolchain(self) -> dict[str, str]:
        """Return the distributions, with versions, that decide what a compile gives."""

    def cpu_features(self) -> tuple[str, ...]:
        """Return the CPU features that a compile on this machine bakes in, () when none.

        An artifact is refused where one of them is lacking.
        """

    def compile(self, source_dir: Path, component: ComponentPlan, out_dir: Path) -> CompiledComponent:
        """Compile one component. Writes below `out_dir` only, uses no network.

        The caller gives it a process of its own, or puts back what it changes in this one: environment,
        threads, random state.

        Raises:
            CompileError: the toolchain refused the model.
            TargetUnavailableError: the toolchain is missing.
        """

    def load(
        self, component_dir: Path, component: ComponentRecord, *, device: Device, threads: int | None
    ) -> Runner:
        """Load a compiled component whose digests were verified.

        Raises:
            LoadError: it cannot run here.
            TargetUnavailableError: the runtime is missing.
        """


# The name that targets written for 0.1 import.
CompiledGraph = CompiledComponent
