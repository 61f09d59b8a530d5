"""What a target, a source and a store must be able to do, and the values they exchange."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, JsonValue

from compileflow.digests import FileRecord
from compileflow.manifest import ComponentRecord, TensorRecord
from compileflow.spec import HfTask, Precision, ShapeBucket

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
    """One component, decided down to the shapes: what `Target.compile` is given.

    Attributes:
        calibration: Natural batches, arrays of the graph's inputs; () unless the target's options say
            `needs_calibration`.
    """

    name: str
    hf_task: HfTask
    precision: Precision
    max_sequence_length: int
    shape_buckets: tuple[ShapeBucket, ...]
    options: Mapping[str, JsonValue] = field(default_factory=dict)
    trust_remote_code: bool = False
    threads: int = 1
    calibration: tuple[Arrays, ...] = ()


@dataclass(frozen=True)
class CompiledGraph:
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
    default_gates: ClassVar[Mapping[Precision, Mapping[str, float]]]

    def probe(self) -> Availability:
        """Look whether the toolchain is here. Never raises, imports nothing heavy."""

    def toolchain(self) -> dict[str, str]:
        """Return the distributions, with versions, that decide what a compile gives."""

    def cpu_features(self) -> tuple[str, ...]:
        """Return the CPU features that a compile on this machine bakes in, () when none.

        An artifact is refused where one of them is lacking.
        """

    def compile(self, source_dir: Path, component: ComponentPlan, out_dir: Path) -> CompiledGraph:
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


@dataclass(frozen=True)
class LocatedSource:
    """A source model, pinned, with its files on this machine.

    Attributes:
        uri: Where it came from.
        revision: Commit, where the place knows one.
        folder: Where its files are.
        files: Those of the model, relative to `folder`.
        hf_task: What its model card says it serves; None where no card says.
        test_files: Folder with inputs.json, inference_params.json and predictions.json, where it has them.
    """

    uri: str
    revision: str
    folder: Path
    files: tuple[str, ...]
    hf_task: HfTask | None = None
    test_files: Path | None = None


class Source(Protocol):
    """A place that uncompiled models come from."""

    def pin(self, location: str, revision: str | None) -> tuple[str, str | None]:
        """Return the URI and, where the place itself knows one, the commit that `revision` means now."""

    def locate(self, location: str, revision: str | None, work_dir: Path) -> LocatedSource:
        """Bring the model's files to this machine; downloads go below `work_dir`."""


@dataclass(frozen=True)
class StoredFolder:
    """A folder in a store."""

    uri: str
    digest: str
    size_bytes: int


@dataclass(frozen=True)
class Collected:
    """What a garbage collection deleted, or would delete."""

    folders: int
    blobs: int
    size_bytes: int


class ArtifactStore(Protocol):
    """Write-once, content-addressed folders, and small records that point at them."""

    uri: str

    def put_folder(self, folder: Path) -> StoredFolder:
        """Store a folder; its listing is written last. Bytes that are there already are not sent again."""

    def get_folder(self, digest: str, dest: Path) -> tuple[FileRecord, ...]:
        """Write the folder below `dest`, which must not exist; every SHA-256 is checked."""

    def open_folder(self, digest: str) -> AbstractContextManager[Path]:
        """Give a verified, read-only copy of the folder for as long as the block lasts."""

    def exists(self, digest: str) -> bool:
        """Say whether the folder is there whole: its listing and every blob."""

    def list(self) -> Iterator[str]:
        """Yield the digests of all folders."""

    def folder_uri(self, digest: str) -> str:
        """Return the URI of a folder in this store."""

    def put_record(self, kind: str, key: str, value: Mapping[str, JsonValue]) -> None:
        """Point `key` at something; replaces what was there, atomically."""

    def get_record(self, kind: str, key: str) -> dict[str, JsonValue] | None:
        """Return what `put_record` wrote, or None."""

    def list_records(self, kind: str) -> Iterator[str]:
        """Yield the keys of all pointers of a kind."""

    def lock(self, key: str, *, on_wait: Callable[[], None]) -> AbstractContextManager[None]:
        """Hold `key` alone among all users of the store; freed when the holder dies."""

    def gc(self, keep: Collection[str], *, min_age_s: float, dry_run: bool = False) -> Collected:
        """Delete folders that are neither in `keep` nor younger than `min_age_s`, then what no folder refers to.

        Args:
            keep: Digests of folders that stay.
            min_age_s: Seconds for which a listing or a blob stays after it was last put, whoever needs it.
            dry_run: Only count.
        """
