"""torch-export: a torch.export program with dynamic axes, run by PyTorch's own kernels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

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
from compileflow.contracts.toolkit import (
    installed_versions,
    load_error,
    probe_installed,
    refusal,
    report_progress,
    require_open,
    torch_threads,
)
from compileflow.source_model import SourceModel, as_tuple_module, free_axes, load_source_model
from compileflow.spec import TEXT_TASKS, Precision

_FILE = "model.pt2"
_COMPILE_NEEDS = ("torch", "transformers")


class TorchExportOptions(TargetOptions):
    """Options of the torch-export target."""

    strict: bool = Field(False, description="Export with TorchDynamo, which checks more and refuses more models.")


class TorchExportTarget:
    """Export with torch.export; the result needs nothing but torch to run."""

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

    def probe(self) -> Availability:
        """Check which distributions are installed, without importing them."""
        return probe_installed(_COMPILE_NEEDS, ("torch",), install="pip install torch transformers")

    def toolchain(self) -> dict[str, str]:
        """Return the versions of torch and transformers."""
        return installed_versions(_COMPILE_NEEDS)

    def cpu_features(self) -> tuple[str, ...]:
        """Return (): a program names operators, and torch chooses their kernels at run time."""
        return ()

    def compile(self, source_dir: Path, component: ComponentPlan, out_dir: Path) -> CompiledComponent:
        """Export one graph with dynamic batch and sequence axes."""
        import torch

        torch.set_num_threads(component.threads)
        options = TorchExportOptions.model_validate(dict(component.options))
        source_model = load_source_model(
            source_dir,
            component.hf_task,
            attention=component.attention,
            trust_remote_code=component.trust_remote_code,
        )
        report_progress("exporting the graph")
        program = _export(source_model, component.max_sequence_length, strict=options.strict)
        report_progress("writing the graph")
        torch.export.save(program, out_dir / _FILE)
        return source_model.compiled_to([_FILE])

    def load(
        self, component_dir: Path, component: ComponentRecord, *, device: Device, threads: int | None
    ) -> Runner:
        """Read the program and make it callable."""
        import torch

        try:
            module = torch.export.load(component_dir / _FILE).module()
        except Exception as error:
            raise load_error(_FILE, f"torch {torch.__version__}", error) from error
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

        # Read the attribute once: another thread may close this runner during the call.
        module = require_open(self._module)
        with torch_threads(self._threads), torch.inference_mode():
            answers = module(*(torch.as_tensor(inputs[name]) for name in self._inputs))
        return {name: answer.numpy() for name, answer in zip(self._outputs, answers, strict=True)}

    def close(self) -> None:
        self._module = None


def _export(source_model: SourceModel, longest: int, *, strict: bool) -> Any:
    import torch

    dynamic = torch.export.Dim.DYNAMIC
    axes = tuple(free_axes(source_model.inputs, dynamic, dynamic).values())
    try:
        with torch.no_grad():
            program = torch.export.export(
                as_tuple_module(source_model),
                tuple(source_model.export_tensors(longest).values()),
                dynamic_shapes=(axes,),
                strict=strict,
            )
    except Exception as error:
        raise refusal("torch.export", error) from error
    # Stack traces hold folders of this machine; equal models should give equal bytes on every machine.
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)
    return program
