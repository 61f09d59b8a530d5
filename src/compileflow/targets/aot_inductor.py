"""aot-inductor: torch.export with dynamic axes, compiled ahead of time to native code in one .pt2 package."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, JsonValue

from compileflow.contracts import (
    Arrays,
    Availability,
    Capabilities,
    CompiledComponent,
    ComponentPlan,
    ComponentRecord,
    Device,
    Runner,
    TargetOptions,
    TensorRecord,
)
from compileflow.contracts.toolkit import (
    INSTALL_TORCH,
    cpu_features,
    environment,
    installed_versions,
    lacking_precisions,
    load_error,
    probe_installed,
    refusal,
    report_progress,
    require_open,
    torch_threads,
    undisturbed_process,
    violated_size,
)
from compileflow.errors import CompileError, InputError
from compileflow.source_model import SourceModel, as_tuple_module, free_axes, load_source_model
from compileflow.source_model.lengths import call_sizes, frames_of, shortest_input
from compileflow.source_model.whole_rows import whole_rows
from compileflow.spec import HfTask, Precision
from compileflow.targets._aot_decoder import CACHE_OPTION, AotDecoder, Package, decoder_module

if TYPE_CHECKING:
    import torch

_FILE = "model.pt2"
_LARGEST_BATCH = 4096
# torch.export treats a size of 1 as a constant, so a single token or frame gets a masked neighbour.
_SHORTEST = 2
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_./+:@=,~-]+")

_BRANCHES_ON_TOKENS = "its code branches on the tokens of a call"
_ONE_BATCH_SIZE = "its code works for one batch size only"
_FAILS = "AOTInductor fails on its graph"
# Their classifiers read the last end token of each row.
_END_TOKEN_TYPES = ("bart", "bigbird_pegasus", "mbart", "mt5", "mvp", "plbart", "t5", "umt5")

# Precompiled headers only pay off from the second compile on, and stay outside the cache folder.
_ONE_COMPILE = {"cpp_cache_precompile_headers": False, "aot_inductor.precompile_headers": False}


class AotInductorOptions(TargetOptions):
    """Options of the aot-inductor target."""

    freezing: bool = Field(
        True,
        description="Turn weights into constants, packed for this CPU's kernels; twice as fast on short texts.",
    )
    max_autotune: bool = Field(
        False,
        description="Time several kernels for each operator and keep the fastest; compiling takes minutes longer.",
    )


class AotInductorTarget:
    """Compile to native code for this machine's CPU, for any batch size and length."""

    name: ClassVar[str] = "aot-inductor"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "torch.export and AOTInductor: native code for the CPU that compiled it"
    Options: ClassVar[type[TargetOptions]] = AotInductorOptions
    component_files: ClassVar[Sequence[str]] = (_FILE,)
    refused_model_types: ClassVar[Mapping[str, str]] = {
        "canine": "its code does not work for every length",
        "d_fine": _ONE_BATCH_SIZE,
        "deformable_detr": "its compile takes many minutes even for a tiny model",
        "glpn": _FAILS,
        "gpt_neox_japanese": _FAILS,
        "longformer": _FAILS,
        "lw_detr": "its compiled graph answers batches differently",
        "openai_privacy_filter": _BRANCHES_ON_TOKENS,
        "rt_detr": _ONE_BATCH_SIZE,
        "rt_detr_v2": _ONE_BATCH_SIZE,
        "swin2sr": _FAILS,
        **{f"text-classification/{model_type}": _BRANCHES_ON_TOKENS for model_type in _END_TOKEN_TYPES},
    }
    capabilities: ClassVar[Capabilities] = Capabilities(
        hf_tasks=tuple(HfTask),
        precisions=(Precision.FP32, Precision.BF16),
        devices=("cpu",),
        dynamic_axes=True,
        torch_operators=True,
        # Packed kernels are faster on CPUs with AVX-512; without it, they lose on larger batches.
        variants={Precision.FP32: ({"freezing": True}, {"freezing": False})},
        # The package's code is linked against torch's libraries, whose ABI changes between minor versions.
        runtime={"torch": "=={minor}.*"},
    )

    def probe(self) -> Availability:
        """Check whether torch and a C++ compiler are installed; running needs only torch."""
        lacking = lacking_precisions(self.capabilities.precisions)
        torch_availability = probe_installed(("torch",), ("torch",), install=INSTALL_TORCH, lacking=lacking)
        compiler = os.environ.get("CXX") or "g++"
        if not torch_availability.can_run or shutil.which(compiler) is not None:
            return torch_availability
        return Availability(
            can_compile=False,
            can_run=True,
            reason=f"the C++ compiler {compiler} is not installed",
            hint="apt-get install g++, or set CXX to another compiler",
            lacking=lacking,
        )

    def toolchain(self) -> dict[str, str]:
        """Return the versions of torch and transformers."""
        return installed_versions(("torch", "transformers"))

    def cpu_features(self) -> tuple[str, ...]:
        """Return this CPU's instruction sets: the generated code may use all of them."""
        return cpu_features()

    def compile(self, source_dir: Path, component: ComponentPlan, out_dir: Path) -> CompiledComponent:
        """Export with dynamic batch and sequence axes, compile to native code, package it with the weights."""
        options = AotInductorOptions.model_validate(dict(component.options))
        source_model = load_source_model(
            source_dir,
            component.hf_task,
            attention=component.attention,
            trust_remote_code=component.trust_remote_code,
        )
        load_options: Mapping[str, JsonValue] = {}
        with torch_threads(component.threads):
            report_progress("exporting the graph")
            if component.hf_task.generates:
                program, load_options = _export_decoder(source_model, component)
            else:
                program = _export(source_model, component)
                if (shortest := _shortest_row(program, source_model)) > _SHORTEST:
                    load_options = {"shortest": shortest}
            report_progress("generating and compiling native code")
            _package(program, out_dir / _FILE, options)
        return source_model.compiled_to(self.component_files, load_options)

    def load(
        self, component_dir: Path, component: ComponentRecord, *, device: Device, threads: int | None
    ) -> Runner:
        """Load the package's shared library, and leave none of it in the temporary folder."""
        import torch

        with undisturbed_process():
            try:
                package = _open(component_dir / _FILE)
            except Exception as error:
                raise load_error(_FILE, f"torch {torch.__version__}", error) from error
        if CACHE_OPTION in component.load_options:
            return AotDecoder(package, component.load_options, threads)
        return _AotInductorRunner(package, component, threads)


def _open(path: Path) -> Package:
    """Return a function that runs a package on a list of tensors, and returns its outputs in order.

    `torch._inductor.aoti_load_package` first runs a C++ compiler for about ten seconds to learn this CPU's
    instruction sets, which `OpenArtifact` has already compared with the manifest. The class below it, which is not
    public, opens the same file at once.
    """
    import torch

    # torch unpacks into TMPDIR and keeps the files mapped. Its own clean-up misses kills and failed loads.
    with (
        tempfile.TemporaryDirectory(prefix="aot-inductor-", dir=_compiler_folder()) as temporary_dir,
        environment(TMPDIR=temporary_dir, TORCHINDUCTOR_CACHE_DIR=temporary_dir),
    ):
        try:
            # Synchronized calls, one runner, on the CPU: the defaults of the public call.
            return _one_at_a_time(torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1).run)
        except (AttributeError, TypeError):
            # This version of torch has another loader. A damaged package raises RuntimeError.
            package = torch._inductor.aoti_load_package(str(path))
    return _one_at_a_time(lambda tensors: torch.utils._pytree.tree_leaves(package(*tensors)))


def _one_at_a_time(package: Package) -> Package:
    """Let concurrent calls wait in Python.

    In native code, a second call would wait for the first one while it holds the GIL, and the first one may need
    the GIL to end.
    """
    lock = threading.Lock()

    def run(tensors: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        with lock:
            return package(tensors)

    return run


class _AotInductorRunner:
    """Runs one package; concurrent calls queue."""

    def __init__(self, package: Package, component: ComponentRecord, threads: int | None):
        self._package: Package | None = package
        self._component = component
        self._threads = threads

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        import torch

        package = require_open(self._package)
        component = self._component
        length = call_sizes(component.inputs[0], inputs[component.inputs[0].name])[1]
        arrays = [self._pad(record, inputs[record.name]) for record in component.inputs]
        with torch.inference_mode(), torch_threads(self._threads):
            answers = package([torch.as_tensor(array) for array in arrays])
        sequence = slice(-length, None) if component.padding == "left" else slice(length)
        places = {"sequence": sequence, "frames": slice(frames_of(component.frame_convolutions, length))}
        return {
            record.name: answer.numpy()[tuple(places.get(str(axis), slice(None)) for axis in record.axes)]
            for record, answer in zip(component.outputs, answers, strict=True)
        }

    def close(self) -> None:
        self._package = None

    def _pad(self, record: TensorRecord, array: NDArray[Any]) -> NDArray[Any]:
        """Pad an input to the shortest length that the graph takes; the mask hides the padding."""
        shortest = shortest_input(self._component.frame_convolutions, _SHORTEST)
        shortest = max(shortest, int(str(self._component.load_options.get("shortest", 0))))
        if "sequence" not in record.axes or array.shape[axis := record.axes.index("sequence")] >= shortest:
            return np.ascontiguousarray(array)
        if all(other.name != "attention_mask" for other in self._component.inputs):
            raise InputError(
                f"Expected rows of at least {shortest} elements, got {array.shape[axis]}: this model has no mask, "
                "so a shorter row cannot be padded.",
                hint="Give a longer recording.",
            )
        width = shortest - array.shape[axis]
        place = (width, 0) if self._component.padding == "left" else (0, width)
        widths = [place if number == axis else (0, 0) for number in range(array.ndim)]
        fill = self._component.pad_token_id if record.name == "input_ids" else 0
        return np.pad(array, widths, constant_values=fill)


def _export(source_model: SourceModel, component: ComponentPlan) -> Any:
    import torch

    longest = component.max_sequence_length
    batch = torch.export.Dim("batch", min=1, max=_LARGEST_BATCH)
    shortest = shortest_input(source_model.frame_convolutions, _SHORTEST)
    sequence = torch.export.Dim("sequence", min=shortest, max=max(longest, shortest + 1))

    def export(batch: Any, sequence: Any) -> Any:
        shapes = tuple(free_axes(source_model.inputs, batch, sequence).values())
        with (
            warnings.catch_warnings(),
            torch.no_grad(),
            _exportable(source_model),
            whole_rows(source_model.model, longest),
        ):
            warnings.simplefilter("ignore")
            # TupleModule.forward takes *tensors, so the shapes of all inputs are one entry, a tuple.
            return torch.export.export(
                as_tuple_module(source_model, component.precision),
                tuple(source_model.export_tensors(longest).values()),
                dynamic_shapes=(shapes,),
                strict=False,
            )

    try:
        try:
            return export(batch, sequence)
        except (torch._dynamo.exc.UserError, AssertionError) as error:
            # Where a size has one value left, torch's own report of it fails.
            if "Constraints violated" not in str(error) and "inconsistent min" not in str(error):
                raise
            # The code of the model does not work for all these sizes, so torch.export finds out for which it does.
            return export(torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC)
    except Exception as error:
        raise refusal("torch.export", error, reason=violated_size(error)) from error


def _export_decoder(source_model: SourceModel, component: ComponentPlan) -> tuple[Any, Mapping[str, JsonValue]]:
    """Export one step of a decoder; return the program and the load options."""
    import torch

    try:
        decoder = decoder_module(source_model, component.precision)
        with (
            warnings.catch_warnings(),
            torch.no_grad(),
            _exportable(source_model),
            whole_rows(source_model.model, component.max_sequence_length),
        ):
            warnings.simplefilter("ignore")
            # Step.forward takes *tensors, so the shapes of all inputs are one entry, a tuple.
            program = torch.export.export(
                decoder.module, decoder.inputs, dynamic_shapes=(decoder.dynamic_shapes,), strict=False
            )
    except Exception as error:
        raise refusal("torch.export", error, reason=violated_size(error)) from error
    return program, decoder.load_options


def _shortest_row(program: Any, source_model: SourceModel) -> int:
    """Return the shortest row that an exported program takes."""
    if "sequence" not in source_model.inputs[0].axes:
        return 1
    names = program.graph_signature.user_inputs
    example = next(node.meta["val"] for node in program.graph.nodes if node.name == names[0])
    size = example.shape[source_model.inputs[0].axes.index("sequence")]
    limits = program.range_constraints.get(getattr(getattr(size, "node", None), "expr", None))
    return int(limits.lower) if limits is not None else 1


@contextmanager
def _exportable(source_model: SourceModel) -> Iterator[None]:
    """Replace code of transformers that torch.export cannot trace, as transformers' own exporters do.

    Not for sdpa: the replacement would take its fast kernel away.
    """
    if source_model.attention == "sdpa":
        yield
        return
    from transformers.exporters.exporter_dynamo import reset_model_state
    from transformers.exporters.utils import apply_patches

    with apply_patches("dynamo"), reset_model_state(source_model.model):
        yield


def _package(program: Any, path: Path, options: AotInductorOptions) -> None:
    import torch

    with tempfile.TemporaryDirectory(prefix="aot-inductor-", dir=_compiler_folder()) as cache:
        try:
            # Inductor reads the variable at each compile. A fresh folder keeps compiles apart and is then deleted.
            with environment(TORCHINDUCTOR_CACHE_DIR=cache), warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                torch._inductor.aoti_compile_and_package(
                    program,
                    package_path=str(path),
                    inductor_configs=_ONE_COMPILE
                    | {"freezing": options.freezing, "max_autotune": options.max_autotune},
                )
        except Exception as error:
            raise refusal("AOTInductor", error, reason=_compiler_error(error)) from error


def _compiler_folder() -> str:
    """Return a folder for temporary files: Inductor splits command lines of the C++ compiler at spaces and quotes.

    Raises:
        CompileError: All folders for temporary files have such a path, or cannot be written.
    """
    folders = (tempfile.gettempdir(), "/tmp", "/var/tmp")  # noqa: S108 - only for names made by mkdtemp
    for folder in folders:
        if _PLAIN_PATH.fullmatch(folder) and os.access(folder, os.W_OK):
            return folder
    raise CompileError(
        f"The C++ compiler of aot-inductor needs a folder without spaces and quotes, got {folders[0]!r}.",
        hint="Set TMPDIR or COMPILEFLOW_HOME to such a folder, or choose another target.",
    )


def _compiler_error(error: Exception) -> str:
    """Return the first error of the C++ compiler; without one, "" stands for the first line."""
    return next((line.strip()[:300] for line in str(error).splitlines() if "error:" in line), "")
