"""aot-inductor: torch.export with dynamic axes, compiled ahead of time to native code in one .pt2 package."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

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
    cpu_features,
    environment,
    installed_versions,
    lacking_precisions,
    report_progress,
    torch_threads,
    undisturbed_process,
)
from compileflow.errors import CompileError, InputError, LoadError, first_line
from compileflow.source_model import (
    SourceModel,
    as_tuple_module,
    example_inputs,
    example_length,
    free_axes,
    load_source_model,
)
from compileflow.source_model.lengths import call_sizes, frames_of, shortest_input
from compileflow.spec import HfTask, Precision

_FILE = "model.pt2"
_LARGEST_BATCH = 4096
# torch.export takes a size of 1 for a constant, so a lone token or frame gets a masked one beside it.
_SHORTEST = 2

# Precompiled headers pay from the second compile on, and are kept outside the cache's folder.
_ONE_COMPILE = {"cpp_cache_precompile_headers": False, "aot_inductor.precompile_headers": False}


class AotInductorOptions(TargetOptions):
    """Options of the aot-inductor target."""

    freezing: bool = Field(
        True,
        description="Make weights constants, packed for this CPU's kernels; twice as fast on short texts.",
    )
    max_autotune: bool = Field(
        False, description="Let inductor time several kernels for each operator; minutes more of compiling."
    )


class AotInductorTarget:
    """Compile to native code for this machine's CPU, any batch size and length."""

    name: ClassVar[str] = "aot-inductor"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "torch.export and AOTInductor: native code for the CPU that it was compiled on"
    Options: ClassVar[type[TargetOptions]] = AotInductorOptions
    capabilities: ClassVar[Capabilities] = Capabilities(
        hf_tasks=tuple(HfTask),
        precisions=(Precision.FP32, Precision.BF16),
        devices=("cpu",),
        dynamic_axes=True,
        # Freezing's packed kernels win on CPUs with AVX-512, and lose on larger batches on those without.
        variants={Precision.FP32: ({"freezing": True}, {"freezing": False})},
        # The package's code is linked against torch's own libraries, which keep no ABI between minor versions.
        runtime={"torch": "=={minor}.*"},
    )
    default_gates: ClassVar[Mapping[Precision, Mapping[str, float]]] = {}

    def probe(self) -> Availability:
        """Look for torch and a C++ compiler; running needs only torch."""
        lacking = lacking_precisions(self.capabilities.precisions)
        if "torch" not in self.toolchain():
            return Availability(
                can_compile=False, can_run=False, reason="torch is not installed", hint="pip install torch"
            )
        compiler = os.environ.get("CXX") or "g++"
        if shutil.which(compiler) is None:
            return Availability(
                can_compile=False,
                can_run=True,
                reason=f"there is no C++ compiler ({compiler})",
                hint="apt-get install g++, or set CXX to one",
                lacking=lacking,
            )
        return Availability(can_compile=True, can_run=True, lacking=lacking)

    def toolchain(self) -> dict[str, str]:
        """Return the versions of torch and transformers."""
        return installed_versions(("torch", "transformers"))

    def cpu_features(self) -> tuple[str, ...]:
        """Return this CPU's instruction sets: the generated code uses whatever there is."""
        return cpu_features()

    def compile(self, source_dir: Path, component: ComponentPlan, out_dir: Path) -> CompiledComponent:
        """Export with dynamic batch and sequence axes, compile to native code, package it with the weights."""
        options = AotInductorOptions.model_validate(dict(component.options))
        report_progress("loading the source model")
        graph = load_source_model(source_dir, component.hf_task, trust_remote_code=component.trust_remote_code)
        with torch_threads(component.threads):
            report_progress("exporting the graph")
            program = _export(graph, component)
            report_progress("generating and compiling native code")
            _package(program, out_dir / _FILE, options)
        return CompiledComponent(
            (_FILE,),
            graph.inputs,
            graph.outputs,
            graph.output_class,
            graph.pad_token_id,
            frame_convolutions=graph.frame_convolutions,
        )

    def load(
        self, component_dir: Path, component: ComponentRecord, *, device: Device, threads: int | None
    ) -> Runner:
        """Load the package's shared library, and leave nothing of it in the temporary folder."""
        import torch

        with undisturbed_process():
            try:
                package = _open(component_dir / _FILE)
            except Exception as error:
                raise LoadError(
                    f"{_FILE} cannot be loaded by torch {torch.__version__}: {first_line(error)}.",
                    hint="Use the torch version that the manifest names, or compile again.",
                ) from error
        return _AotInductorRunner(package, component, threads)


def _open(path: Path) -> Any:
    import torch

    # torch unpacks into TMPDIR and stays mapped there. Its own clean-up knows neither kills nor failed loads.
    with (
        tempfile.TemporaryDirectory(prefix="aot-inductor-") as unpacked,
        environment(TMPDIR=unpacked, TORCHINDUCTOR_CACHE_DIR=unpacked),
    ):
        return torch._inductor.aoti_load_package(str(path))


class _AotInductorRunner:
    """Runs one package; concurrent calls queue inside it."""

    def __init__(self, package: Any, component: ComponentRecord, threads: int | None):
        self._package = package
        self._component = component
        self._threads = threads

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        import torch

        package = self._package
        if package is None:
            raise InputError("This compiled model was closed.", hint="Load it again.")
        record = self._component
        length = call_sizes(record.inputs[0], inputs[record.inputs[0].name])[1]
        arrays = [self._widened(each, inputs[each.name]) for each in record.inputs]
        with torch.inference_mode(), torch_threads(self._threads):
            answers = package(*(torch.as_tensor(array) for array in arrays))
        if isinstance(answers, torch.Tensor):
            answers = (answers,)
        kept = {"sequence": length, "frames": frames_of(record.frame_convolutions, length)}
        return {
            each.name: answer.numpy()[tuple(slice(kept.get(str(axis))) for axis in each.axes)]
            for each, answer in zip(record.outputs, answers, strict=True)
        }

    def close(self) -> None:
        self._package = None

    def _widened(self, record: TensorRecord, array: NDArray[Any]) -> NDArray[Any]:
        """Pad what torch.export would take for a constant; what is added is masked out."""
        shortest = shortest_input(self._component.frame_convolutions, _SHORTEST)
        if "sequence" not in record.axes or array.shape[axis := record.axes.index("sequence")] >= shortest:
            return np.ascontiguousarray(array)
        if all(each.name != "attention_mask" for each in self._component.inputs):
            raise InputError(
                f"{array.shape[axis]} elements a row; this graph, which has no mask, needs {shortest}.",
                hint="Give a longer recording.",
            )
        missing = [(0, shortest - array.shape[axis] if n == axis else 0) for n in range(array.ndim)]
        fill = self._component.pad_token_id if record.name == "input_ids" else 0
        return np.pad(array, missing, constant_values=fill)


def _export(graph: SourceModel, component: ComponentPlan) -> Any:
    import torch

    longest = component.max_sequence_length
    batch = torch.export.Dim("batch", min=1, max=_LARGEST_BATCH)
    shortest = shortest_input(graph.frame_convolutions, _SHORTEST)
    sequence = torch.export.Dim("sequence", min=shortest, max=max(longest, shortest + 1))
    length = example_length(graph.inputs, longest)
    example = example_inputs(graph.inputs, 3, length, graph.vocab_size, graph.pad_token_id)
    tensors = tuple(torch.as_tensor(example[record.name]) for record in graph.inputs)
    shapes = tuple(free_axes(graph.inputs, batch, sequence).values())
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            # The wrapper takes its tensors as *args: one entry, a tuple.
            return torch.export.export(
                as_tuple_module(graph, component.precision), tensors, dynamic_shapes=(shapes,), strict=False
            )
    except Exception as error:
        raise CompileError(
            f"torch.export refused the model: {type(error).__name__}: {first_line(error)}.",
            hint="Try another target; `compileflow targets` lists them.",
        ) from error


def _package(program: Any, path: Path, options: AotInductorOptions) -> None:
    import torch

    with tempfile.TemporaryDirectory(prefix="aot-inductor-") as cache:
        try:
            # Inductor reads it at each compile; a folder of its own keeps runs apart and leaves nothing behind.
            with environment(TORCHINDUCTOR_CACHE_DIR=cache), warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                torch._inductor.aoti_compile_and_package(
                    program,
                    package_path=str(path),
                    inductor_configs=_ONE_COMPILE
                    | {"freezing": options.freezing, "max_autotune": options.max_autotune},
                )
        except Exception as error:
            raise CompileError(
                f"AOTInductor refused the model: {type(error).__name__}: {first_line(error)}.",
                hint="Try another target; `compileflow targets` lists them.",
            ) from error
