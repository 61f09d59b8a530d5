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
    CompiledGraph,
    ComponentPlan,
    Device,
    Runner,
    TargetOptions,
)
from compileflow.cpu import cpu_features, lacking_precisions
from compileflow.errors import CompileError, InputError, LoadError
from compileflow.isolation import report_progress
from compileflow.manifest import ComponentRecord
from compileflow.process_state import torch_threads, undisturbed_process
from compileflow.source_graph import SourceGraph, as_tuple_module, example_inputs, load_source_graph
from compileflow.spec import HfTask, Precision
from compileflow.toolchain import installed_versions

_FILE = "model.pt2"
_LARGEST_BATCH = 4096
# torch.export takes a size of 1 for a constant, so a lone token gets a masked one beside it.
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

    def compile(self, source_dir: Path, component: ComponentPlan, out_dir: Path) -> CompiledGraph:
        """Export with dynamic batch and sequence axes, compile to native code, package it with the weights."""
        options = AotInductorOptions.model_validate(dict(component.options))
        report_progress("loading the source model")
        graph = load_source_graph(source_dir, component.hf_task, trust_remote_code=component.trust_remote_code)
        with torch_threads(component.threads):
            report_progress("exporting the graph")
            program = _export(graph, component)
            report_progress("generating and compiling native code")
            _package(program, out_dir / _FILE, options)
        return CompiledGraph((_FILE,), graph.inputs, graph.outputs, graph.output_class, graph.pad_token_id)

    def load(
        self, component_dir: Path, component: ComponentRecord, *, device: Device, threads: int | None
    ) -> Runner:
        """Load the package's shared library; it is unpacked into the temporary folder."""
        import torch

        with undisturbed_process():
            try:
                package = torch._inductor.aoti_load_package(str(component_dir / _FILE))
            except Exception as error:
                raise LoadError(
                    f"{_FILE} cannot be loaded by torch {torch.__version__}: {str(error).splitlines()[0][:300]}",
                    hint="Use the torch version that the manifest names, or compile again.",
                ) from error
        return _AotInductorRunner(package, component, threads)


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
        names = [record.name for record in self._component.inputs]
        length = inputs[names[0]].shape[1]
        arrays = [_widened(inputs[name], self._fill(name)) for name in names]
        with torch.inference_mode(), torch_threads(self._threads):
            answers = package(*(torch.as_tensor(array) for array in arrays))
        if isinstance(answers, torch.Tensor):
            answers = (answers,)
        return {
            record.name: _narrowed(answer.numpy(), record.axes, length)
            for record, answer in zip(self._component.outputs, answers, strict=True)
        }

    def close(self) -> None:
        self._package = None

    def _fill(self, name: str) -> int:
        return self._component.pad_token_id if name == "input_ids" else 0


def _widened(array: NDArray[Any], fill: int) -> NDArray[Any]:
    missing = max(0, _SHORTEST - array.shape[1])
    return np.pad(array, ((0, 0), (0, missing)), constant_values=fill) if missing else np.ascontiguousarray(array)


def _narrowed(array: NDArray[Any], axes: tuple[Any, ...], length: int) -> NDArray[Any]:
    if length < _SHORTEST and "sequence" in axes:
        return np.take(array, range(length), axis=axes.index("sequence"))
    return array


def _export(graph: SourceGraph, component: ComponentPlan) -> Any:
    import torch

    longest = component.max_sequence_length
    batch = torch.export.Dim("batch", min=1, max=_LARGEST_BATCH)
    sequence = torch.export.Dim("sequence", min=_SHORTEST, max=max(longest, _SHORTEST + 1))
    example = example_inputs(graph.inputs, 3, min(16, longest), graph.vocab_size, graph.pad_token_id)
    tensors = tuple(torch.as_tensor(example[record.name]) for record in graph.inputs)
    shapes = tuple({0: batch, 1: sequence} for _ in graph.inputs)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            # The wrapper takes its tensors as *args: one entry, a tuple.
            return torch.export.export(
                as_tuple_module(graph, component.precision), tensors, dynamic_shapes=(shapes,), strict=False
            )
    except Exception as error:
        raise CompileError(
            f"torch.export refused the model: {type(error).__name__}: {_first_line(error)}",
            hint="Try another target; `compileflow targets` lists them.",
        ) from error


def _package(program: Any, path: Path, options: AotInductorOptions) -> None:
    import torch

    with tempfile.TemporaryDirectory(prefix="aot-inductor-") as cache:
        # Inductor reads it at each compile; a folder of its own keeps runs apart and leaves nothing behind.
        before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                torch._inductor.aoti_compile_and_package(
                    program,
                    package_path=str(path),
                    inductor_configs=_ONE_COMPILE
                    | {"freezing": options.freezing, "max_autotune": options.max_autotune},
                )
        except Exception as error:
            raise CompileError(
                f"AOTInductor refused the model: {type(error).__name__}: {_first_line(error)}",
                hint="Try another target; `compileflow targets` lists them.",
            ) from error
        finally:
            if before is None:
                os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
            else:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")[:300]
