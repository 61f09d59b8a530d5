"""torchscript: torch.jit.trace at fixed shapes, frozen at load; runs wherever torch runs.

All shape buckets live in one file: the traced graphs share the weights, which are therefore stored once.
Freezing copies weights into each graph, so it happens at load, where the copies are shared with the module.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from numpy.typing import NDArray

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
)
from compileflow.contracts.toolkit import installed_versions, lacking_precisions, report_progress, torch_threads
from compileflow.errors import CompileError, InputError, LoadError
from compileflow.source_model import as_tuple_module, example_inputs, load_source_model
from compileflow.source_model.lengths import call_sizes
from compileflow.spec import HfTask, Precision, ShapeBucket

_FILE = "model.pt"


class TorchScriptTarget:
    """Compile with torch.jit: nothing but torch is needed to run the result."""

    name: ClassVar[str] = "torchscript"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "torch.jit.trace, frozen; fixed shapes; any machine with torch"
    Options: ClassVar[type[TargetOptions]] = TargetOptions
    capabilities: ClassVar[Capabilities] = Capabilities(
        hf_tasks=tuple(HfTask),
        precisions=(Precision.FP32, Precision.BF16),
        devices=("cpu",),
        dynamic_axes=False,
        runtime={"torch": ">={minor},<{next_major}"},
    )
    default_gates: ClassVar[Mapping[Precision, Mapping[str, float]]] = {}

    def probe(self) -> Availability:
        """Look whether torch is installed, without importing it."""
        if "torch" in self.toolchain():
            lacking = lacking_precisions(self.capabilities.precisions)
            return Availability(can_compile=True, can_run=True, lacking=lacking)
        return Availability(
            can_compile=False, can_run=False, reason="torch is not installed", hint="pip install torch"
        )

    def toolchain(self) -> dict[str, str]:
        """Return the versions of torch and transformers."""
        return installed_versions(("torch", "transformers"))

    def cpu_features(self) -> tuple[str, ...]:
        """Return (): a traced graph names operators, the CPU is chosen when it runs."""
        return ()

    def compile(self, source_dir: Path, component: ComponentPlan, out_dir: Path) -> CompiledComponent:
        """Trace one graph a shape bucket and save them all in one file."""
        import torch

        report_progress("loading the source model")
        graph = load_source_model(source_dir, component.hf_task, trust_remote_code=component.trust_remote_code)
        module = as_tuple_module(graph, component.precision)

        class Buckets(torch.nn.Module):
            """Holds one traced graph a bucket."""

        holder = Buckets()
        for number, bucket in enumerate(component.shape_buckets, start=1):
            report_progress(f"tracing shape bucket {bucket} ({number} of {len(component.shape_buckets)})")
            example = example_inputs(
                graph.inputs, bucket.batch_size, bucket.sequence_length, graph.vocab_size, graph.pad_token_id
            )
            tensors = tuple(torch.as_tensor(example[record.name]) for record in graph.inputs)
            with torch_threads(component.threads):
                setattr(holder, _attribute(bucket), _trace(module, tensors))
        with warnings.catch_warnings():
            _silence_deprecation()
            torch.jit.save(torch.jit.script(holder), str(out_dir / _FILE))
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
        """Load and freeze every shape bucket."""
        import torch

        with warnings.catch_warnings():
            _silence_deprecation()
            try:
                holder = torch.jit.load(str(component_dir / _FILE), map_location=device).eval()  # type: ignore[no-untyped-call]
                graphs = {
                    (bucket.batch_size, bucket.sequence_length): torch.jit.freeze(
                        getattr(holder, _attribute(bucket))
                    )
                    for bucket in component.shape_buckets
                }
            except (RuntimeError, AttributeError) as error:
                raise LoadError(
                    f"{_FILE} cannot be loaded by torch {torch.__version__}: {error}",
                    hint="Use the torch version that the manifest names, or compile again.",
                ) from error
        return _TorchScriptRunner(graphs, component, threads)


class _TorchScriptRunner:
    """Runs the graph whose shape the inputs have."""

    def __init__(self, graphs: dict[tuple[int, int], Any], component: ComponentRecord, threads: int | None):
        self._graphs = graphs
        self._component = component
        self._threads = threads

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        import torch

        names = [record.name for record in self._component.inputs]
        shape = call_sizes(self._component.inputs[0], inputs[names[0]])
        if not self._graphs:
            raise InputError("This compiled model was closed.", hint="Load it again.")
        if shape not in self._graphs:
            raise InputError(
                f"Shape {shape} is no shape bucket of this graph.",
                hint="Call it through CompiledModel, which pads to a bucket.",
            )
        with torch.inference_mode(), torch_threads(self._threads):
            answers = self._graphs[shape](*(torch.as_tensor(inputs[name]) for name in names))
        return {
            record.name: answer.numpy() for record, answer in zip(self._component.outputs, answers, strict=True)
        }

    def close(self) -> None:
        self._graphs = {}


def _attribute(bucket: ShapeBucket) -> str:
    return f"bucket_{bucket.batch_size}x{bucket.sequence_length}"


def _trace(module: Any, tensors: tuple[Any, ...]) -> Any:
    import torch

    with warnings.catch_warnings(), torch.no_grad():
        _silence_deprecation()
        # Shape arithmetic becomes constant: that is what a bucket is.
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
        # The tracer looks at every attribute of the model, transformers' deprecated ones too.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        try:
            return torch.jit.trace(module, tensors, strict=False, check_trace=False)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise CompileError(
                f"torch.jit.trace refused the model: {error}",
                hint="Try another target; `compileflow targets` lists them.",
            ) from error


def _silence_deprecation() -> None:
    """torch.jit is deprecated since torch 2.11 and works; the targets table says so."""
    warnings.filterwarnings("ignore", message=r".*torch\.jit\..*deprecated.*")
