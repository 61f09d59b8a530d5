"""torch-export: a torch.export program with dynamic axes, run by PyTorch's own kernels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

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
)
from compileflow.contracts.toolkit import installed_versions, report_progress, torch_threads
from compileflow.errors import CompileError, InputError, LoadError
from compileflow.source_model import SourceModel, as_tuple_module, example_inputs, load_source_model
from compileflow.spec import TEXT_TASKS, Precision

_FILE = "model.pt2"
_NEEDS = ("torch", "transformers")


class TorchExportOptions(TargetOptions):
    """Options of the torch-export target."""

    attention: Literal["sdpa", "eager"] = Field(
        "sdpa", description="Attention as one operator (sdpa), or as matrix products and a softmax (eager)."
    )


class TorchExportTarget:
    """Export with torch.export: nothing but torch is needed to run the result."""

    name: ClassVar[str] = "torch-export"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "torch.export program with dynamic axes; any machine with torch"
    Options: ClassVar[type[TargetOptions]] = TorchExportOptions
    capabilities: ClassVar[Capabilities] = Capabilities(
        hf_tasks=TEXT_TASKS,
        precisions=(Precision.FP32,),
        devices=("cpu",),
        dynamic_axes=True,
        # torch does not promise to read programs that another version saved.
        runtime={"torch": "=={minor}.*"},
    )
    default_gates: ClassVar[Mapping[Precision, Mapping[str, float]]] = {}

    def probe(self) -> Availability:
        """Look which distributions are installed, without importing them."""
        missing = [name for name in _NEEDS if name not in self.toolchain()]
        if not missing:
            return Availability(can_compile=True, can_run=True)
        return Availability(
            can_compile=False,
            can_run="torch" not in missing,
            reason=f"{', '.join(missing)} not installed",
            hint=f"pip install {' '.join(missing)}",
        )

    def toolchain(self) -> dict[str, str]:
        """Return the versions of torch and transformers."""
        return installed_versions(_NEEDS)

    def cpu_features(self) -> tuple[str, ...]:
        """Return (): a program names operators, the CPU is chosen when it runs."""
        return ()

    def compile(self, source_dir: Path, component: ComponentPlan, out_dir: Path) -> CompiledComponent:
        """Export one graph with dynamic batch and sequence axes."""
        import torch

        torch.set_num_threads(component.threads)
        options = TorchExportOptions.model_validate(dict(component.options))
        report_progress("loading the source model")
        graph = load_source_model(
            source_dir,
            component.hf_task,
            attention=options.attention,
            trust_remote_code=component.trust_remote_code,
        )
        report_progress("exporting the graph")
        program = _export(graph, min(16, component.max_sequence_length))
        report_progress("writing the graph")
        torch.export.save(program, out_dir / _FILE)
        return CompiledComponent((_FILE,), graph.inputs, graph.outputs, graph.output_class, graph.pad_token_id)

    def load(
        self, component_dir: Path, component: ComponentRecord, *, device: Device, threads: int | None
    ) -> Runner:
        """Read the program and make it callable."""
        import torch

        try:
            module = torch.export.load(component_dir / _FILE).module()
        except Exception as error:
            raise LoadError(
                f"{_FILE} cannot be loaded by torch {torch.__version__}: {error}",
                hint="Use the torch version that the manifest names, or compile again.",
            ) from error
        return _TorchExportRunner(module, component, threads)


class _TorchExportRunner:
    """Runs one exported program."""

    def __init__(self, module: Any, component: ComponentRecord, threads: int | None):
        self._module = module
        self._inputs = [record.name for record in component.inputs]
        self._outputs = [record.name for record in component.outputs]
        self._threads = threads

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        import torch

        # Another thread may close this runner between here and the call.
        module = self._module
        if module is None:
            raise InputError("This compiled model was closed.", hint="Load it again.")
        with torch_threads(self._threads), torch.inference_mode():
            answers = module(*(torch.as_tensor(inputs[name]) for name in self._inputs))
        return {name: answer.numpy() for name, answer in zip(self._outputs, answers, strict=True)}

    def close(self) -> None:
        self._module = None


def _export(graph: SourceModel, length: int) -> Any:
    import torch

    # Sizes of 0 and 1 in an example are taken for constants: the program would refuse every other batch.
    example = example_inputs(graph.inputs, 3, max(2, length), graph.vocab_size, graph.pad_token_id)
    tensors = tuple(torch.as_tensor(example[record.name]) for record in graph.inputs)
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    try:
        with torch.no_grad():
            program = torch.export.export(
                as_tuple_module(graph), tensors, dynamic_shapes=((axes,) * len(tensors),)
            )
    except Exception as error:
        raise CompileError(
            f"torch.export refused the model: {type(error).__name__}: {str(error)[:300]}",
            hint="Try another target; `compileflow targets` lists them.",
        ) from error
    # Stack traces name this machine's folders; the same model should give the same bytes on any machine.
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)
    return program
