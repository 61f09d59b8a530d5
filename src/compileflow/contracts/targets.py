"""The protocol of a target, and the values that it exchanges with its caller.

`compileflow.testing.targets.TargetConformance` checks an implementation; `compileflow.contracts.toolkit` helps to
write one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, JsonValue

from compileflow.contracts.records import Attention, ComponentRecord, Padding, TensorRecord
from compileflow.spec import CompileSpec, ComponentSpec, HfTask, Precision, ShapeBucket

Arrays = dict[str, NDArray[Any]]
Device = Literal["cpu", "cuda", "neuron", "lpu", "lpu-gpu"]


@dataclass(frozen=True)
class Availability:
    """Whether a target can compile and run on this machine; if not, the reason and a hint.

    Attributes:
        can_compile: Whether the toolchain is installed.
        can_run: Whether the runtime is installed and the machine has the device.
        reason: What is missing, if one of the two is False.
        hint: How to provide it, for example a command that installs it.
        lacking: Precisions of the target that this machine cannot run, each with the reason.
        run_reason: What the runtime alone lacks; "" for the same as `reason`.
        run_hint: How to provide the runtime alone; "" for the same as `hint`.
    """

    can_compile: bool
    can_run: bool
    reason: str = ""
    hint: str = ""
    lacking: Mapping[Precision, str] = field(default_factory=dict)
    run_reason: str = ""
    run_hint: str = ""


@dataclass(frozen=True)
class Capabilities:
    """What a target supports on any machine.

    Attributes:
        hf_tasks: Hub tasks that the target compiles.
        precisions: Number formats that the target compiles to.
        generation_precisions: Number formats for text generation, where they differ from `precisions`.
        devices: Devices that the compiled model runs on. The first one is the default.
        dynamic_axes: Whether a compiled model runs any shape. False: it runs only its shape buckets.
        compile_needs_device: Whether a compile needs the device.
        torch_operators: Whether a compiled model runs torch's own operators, so that it lacks none of them.
        variants: Per precision, the sets of options that target `auto` tries. For a precision without an entry,
            `auto` tries the default options.
        runtime: Per distribution that a load needs, the versions that can load a compiled model, as a PEP 440
            specifier. It may contain parts of the version at compile time: for 2.13.1, {major} is 2, {minor} is
            2.13, {release} is 2.13.1, and {next_major} is 3. Other distributions are not checked.
        runtime_install: Command that installs such versions. {} stands for the requirements.
    """

    hf_tasks: tuple[HfTask, ...]
    precisions: tuple[Precision, ...]
    devices: tuple[Device, ...]
    dynamic_axes: bool
    compile_needs_device: bool = False
    torch_operators: bool = False
    variants: Mapping[Precision, tuple[Mapping[str, JsonValue], ...]] = field(default_factory=dict)
    runtime: Mapping[str, str] = field(default_factory=dict)
    runtime_install: str = "pip install {}"
    generation_precisions: tuple[Precision, ...] = ()

    def precisions_for(self, hf_task: HfTask) -> tuple[Precision, ...]:
        """Return the number formats that the target compiles a task to."""
        return (self.generation_precisions if hf_task.generates else ()) or self.precisions

    @property
    def all_precisions(self) -> tuple[Precision, ...]:
        """Number formats that the target compiles at least one task to."""
        return tuple(dict.fromkeys((*self.precisions, *self.generation_precisions)))


@dataclass(frozen=True)
class ComponentPlan:
    """One component with its shapes resolved: the input of `Target.compile`.

    Attributes:
        spec: Specification of the whole artifact.
        component: The component, with its maximum length set, and its shape buckets if the target needs them.
        threads: Threads that the compile may use.
        calibration: Batches of natural examples, as arrays of the graph's inputs; () unless the target's options
            return True from `needs_calibration`.
        attention: Attention to load the source model with. It is eager in a second attempt, after sdpa failed.
    """

    spec: CompileSpec
    component: ComponentSpec
    threads: int = 1
    calibration: tuple[Arrays, ...] = ()
    attention: Attention = "sdpa"

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
    """Result of `Target.compile`: the files that it wrote, and the interface of the compiled graph.

    Attributes:
        files: Paths of the files, relative to `out_dir`.
        inputs: Inputs of the graph.
        outputs: Outputs of the graph, which are float32 at every precision.
        output_class: Output class of the source model, as module:Class.
        pad_token_id: Token that pads input_ids after the end of a row.
        load_options: JSON values that `Target.load` receives again, in the record of the component.
        frame_convolutions: (kernel, stride) of each convolution that turns a sequence into frames; () if none.
        attention: Implementation of attention that the graph was made from: sdpa or eager; "" if unknown.
        padding: Side on which padding leaves answers unchanged, or none; None if it was not measured.
        vocab_size: Number of token ids that the model takes; 0 if unknown.
    """

    files: tuple[str, ...]
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    output_class: str
    pad_token_id: int
    load_options: Mapping[str, JsonValue] = field(default_factory=dict)
    frame_convolutions: tuple[tuple[int, int], ...] = ()
    attention: str = ""
    padding: Padding | None = None
    vocab_size: int = 0


class Runner(Protocol):
    """A loaded component. Several threads may call it at once."""

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """Run the compiled graph.

        Args:
            inputs: Name of each input to its array, with the types and axes of the component's record.

        Returns:
            Name of each output to its array, with the types and axes of the component's record.
        """

    def close(self) -> None:
        """Release memory and device. A second call does nothing."""


class Continuation(Protocol):
    """Rows that a component of text generation has read, and from which it predicts their next tokens.

    One thread at a time uses it.

    Attributes:
        length: Tokens of each row that were read, with padding.
    """

    length: int

    def read(
        self,
        input_ids: NDArray[Any],
        attention_mask: NDArray[Any],
        position_ids: NDArray[Any],
        *,
        last: bool = False,
    ) -> NDArray[Any]:
        """Read the next tokens of each row.

        Args:
            input_ids: The tokens, int64 of shape (rows, tokens).
            attention_mask: 0 for padding, 1 for tokens that count, int64 of shape (rows, all tokens read so far).
            position_ids: Position of each token in its row without padding, int64 of the shape of `input_ids`.
            last: Return the logits of the last token alone, which saves time and memory for a prompt.

        Returns:
            Logits of the token after each of these tokens, float32 of shape (rows, tokens or 1, vocabulary).
        """

    def reorder(self, rows: NDArray[Any]) -> None:
        """Replace the rows by copies of some of them.

        Args:
            rows: Number of the row that takes each place, int of shape (rows,).
        """

    def close(self) -> None:
        """Forget the rows. A second call does nothing."""


class GeneratingRunner(Runner, Protocol):
    """A loaded component of text generation. `run` reads whole rows at once, and remembers nothing."""

    def start(self) -> Continuation:
        """Begin to read new rows, independent of those that other continuations have read."""


@runtime_checkable
class WritingRunner(GeneratingRunner, Protocol):
    """A component of text generation whose runtime also writes whole texts by itself. Optional."""

    def write(self, prompt: NDArray[Any], *, new_tokens: int, end_id: int | None) -> NDArray[Any]:
        """Write on from one prompt, taking the likeliest token each time.

        Args:
            prompt: Token ids without padding, int64 of shape (tokens,).
            new_tokens: Tokens to write at most.
            end_id: Token that ends the text; None: no token does.

        Returns:
            The new token ids, with the token that ended the text, int64 of shape (new tokens,).
        """


class TargetOptions(BaseModel):
    """Base class of a target's options: immutable, without unknown names, and without guesses at types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def needs_calibration(self, precision: Precision) -> bool:
        """Say whether a compile at this precision needs natural examples for calibration."""
        return False

    def check_precision(self, precision: Precision) -> None:
        """Check that the options suit a precision, before anything is loaded.

        Raises:
            SpecError: They contradict it.
        """

    def check_task(self, hf_task: HfTask, precision: Precision) -> None:
        """Check that the options suit a task at a precision, before anything is loaded.

        Raises:
            SpecError: They contradict it.
        """


@runtime_checkable
class Target(Protocol):
    """A toolchain and a runtime that a model can be compiled for.

    The module of a target must be cheap to import: each method imports the toolchain that it needs.

    Attributes:
        name: Name of the target in specifications and on the command line.
        version: Version of the target's code. Raise it when the output changes; it is part of the cache key.
        summary: One line for the list of targets.
        Options: Class of the target's options.
        capabilities: What the target supports.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    summary: ClassVar[str]
    Options: ClassVar[type[TargetOptions]]
    capabilities: ClassVar[Capabilities]

    def probe(self) -> Availability:
        """Look for toolchain, runtime and device on this machine. Must not raise, and must not import them."""

    def toolchain(self) -> dict[str, str]:
        """Return the distributions that influence the output of a compile, with their installed versions."""

    def cpu_features(self) -> tuple[str, ...]:
        """Return the CPU features that the output of a compile on this machine needs; () if none.

        compileflow refuses to load the artifact on a machine that lacks one of them.
        """

    def compile(self, source_dir: Path, component: ComponentPlan, out_dir: Path) -> CompiledComponent:
        """Compile one component. Must write only below `out_dir` and must not use the network.

        The caller runs it in a child process, or restores what it changes in this process: environment, threads,
        random state.

        Args:
            source_dir: Folder of the source model.
            component: Component to compile.
            out_dir: Empty folder for the compiled files.

        Raises:
            CompileError: The toolchain refused the model.
            TargetUnavailableError: The toolchain is not installed.
        """

    def load(
        self, component_dir: Path, component: ComponentRecord, *, device: Device, threads: int | None
    ) -> Runner:
        """Load a compiled component. The caller has verified the digests of its files.

        Args:
            component_dir: Folder that `compile` wrote.
            component: Record of the component in the manifest.
            device: One of the target's devices.
            threads: Number of threads for the runtime. None: the runtime decides.

        Raises:
            LoadError: The component cannot run on this machine.
            TargetUnavailableError: The runtime is not installed.
        """


@runtime_checkable
class ObservableTarget(Protocol):
    """A target that also gives the tensors inside a compiled graph, which show where a fault begins. Optional."""

    def observe(
        self,
        component_dir: Path,
        component: ComponentRecord,
        inputs: Mapping[str, NDArray[Any]],
        *,
        threads: int | None,
        parts: int = 1,
    ) -> Iterator[Arrays]:
        """Run a compiled component once, and yield the floating-point tensors that follow from its inputs.

        Args:
            component_dir: Folder that `compile` wrote.
            component: Record of the component in the manifest.
            inputs: Inputs of `Runner.run`.
            threads: Number of threads for the runtime. None: the runtime decides.
            parts: Number of parts in which the tensors are computed, so that one part at a time is in memory.

        Yields:
            The tensors of each part by any name, and in the end the outputs of the component by their names.
        """


# Targets that were written for version 0.1 import this name.
CompiledGraph = CompiledComponent
