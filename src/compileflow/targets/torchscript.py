"""torchscript: torch.jit.trace at fixed shapes, frozen at load; runs wherever torch runs.

All shape buckets live in one file: the traced graphs share the weights, which are therefore stored once.
Freezing copies weights into each graph, so it happens at load, where the copies are shared with the module.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
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
from compileflow.contracts.toolkit import (
    INSTALL_TORCH,
    in_parts,
    installed_versions,
    lacking_precisions,
    load_error,
    probe_installed,
    refusal,
    report_progress,
    torch_threads,
)
from compileflow.source_model import UNMASKED_TASKS, as_tuple_module, load_source_model
from compileflow.source_model.lengths import call_sizes
from compileflow.source_model.traceable import traceable
from compileflow.spec import HfTask, Precision, ShapeBucket
from compileflow.targets._traced import TracedRunner, readable_class_names

GRAPH_FILE = "model.pt"


class TorchScriptTarget:
    """Compile with torch.jit; the result needs nothing but torch to run."""

    name: ClassVar[str] = "torchscript"
    version: ClassVar[int] = 2
    component_files: ClassVar[Sequence[str]] = (GRAPH_FILE,)
    refused_model_types: ClassVar[Mapping[str, str]] = {
        "jetmoe": "its traced graph keeps the experts that the example chose",
        "lw_detr": "its traced graph answers differently",
    }
    summary: ClassVar[str] = "torch.jit.trace, frozen; fixed shapes; any machine with torch"
    Options: ClassVar[type[TargetOptions]] = TargetOptions
    capabilities: ClassVar[Capabilities] = Capabilities(
        hf_tasks=tuple(task for task in HfTask if not task.generates and task not in UNMASKED_TASKS),
        precisions=(Precision.FP32, Precision.BF16),
        devices=("cpu",),
        dynamic_axes=False,
        torch_operators=True,
        runtime={"torch": ">={minor},<{next_major}"},
    )

    def probe(self) -> Availability:
        """Check whether torch is installed, without importing it."""
        lacking = lacking_precisions(self.capabilities.precisions)
        return probe_installed(("torch",), ("torch",), install=INSTALL_TORCH, lacking=lacking)

    def toolchain(self) -> dict[str, str]:
        """Return the versions of torch and transformers."""
        return installed_versions(("torch", "transformers"))

    def cpu_features(self) -> tuple[str, ...]:
        """Return (): a traced graph names operators, and torch chooses their kernels at run time."""
        return ()

    def compile(self, source_dir: Path, component: ComponentPlan, out_dir: Path) -> CompiledComponent:
        """Trace one graph for each shape bucket, and save them all in one file."""
        import torch

        source_model = load_source_model(
            source_dir,
            component.hf_task,
            attention=component.attention,
            trust_remote_code=component.trust_remote_code,
        )
        module = as_tuple_module(source_model, component.precision)

        class Buckets(torch.nn.Module):
            """Holds one traced graph for each shape bucket."""

        buckets = Buckets()
        for number, bucket in enumerate(component.shape_buckets, start=1):
            report_progress(f"tracing shape bucket {bucket} ({number} of {len(component.shape_buckets)})")
            example = source_model.example_tensors(bucket.batch_size, bucket.sequence_length)
            with torch_threads(component.threads), readable_class_names(module), traceable():
                setattr(buckets, bucket_attribute(bucket), _trace(module, tuple(example.values())))
        with warnings.catch_warnings():
            _silence_deprecation()
            torch.jit.save(torch.jit.script(buckets), str(out_dir / GRAPH_FILE))
        return source_model.compiled_to(self.component_files)

    def load(
        self, component_dir: Path, component: ComponentRecord, *, device: Device, threads: int | None
    ) -> Runner:
        """Load and freeze the graph of every shape bucket."""
        return TracedRunner(_frozen(component_dir, component, device), component, threads=threads)

    def observe(
        self,
        component_dir: Path,
        component: ComponentRecord,
        inputs: Mapping[str, NDArray[Any]],
        *,
        threads: int | None,
        parts: int = 1,
    ) -> Iterator[Arrays]:
        """Run the frozen graph of the inputs' bucket with the tensors between its operators as further outputs."""
        import torch

        graphs = _frozen(component_dir, component, "cpu")
        graph = graphs[call_sizes(component.inputs[0], inputs[component.inputs[0].name])].graph
        tensors = [torch.as_tensor(inputs[record.name]) for record in component.inputs]
        names = [value.debugName() for value in _inner_values(graph)]
        for part in in_parts(range(len(names)), parts):
            function = _with_outputs(graph, part)
            with torch.inference_mode(), torch_threads(threads):
                answers = function(*tensors)
            yield {
                names[position]: answer.float().numpy()
                for position, answer in zip(part, answers, strict=True)
                if answer.is_floating_point()
            }
        yield TracedRunner(graphs, component, threads=threads).run(inputs)


def _frozen(component_dir: Path, component: ComponentRecord, device: str) -> dict[tuple[int, int], Any]:
    """Load and freeze the graph of each (batch size, sequence length).

    Raises:
        LoadError: torch does not accept the file.
    """
    import torch

    with warnings.catch_warnings():
        _silence_deprecation()
        try:
            buckets = torch.jit.load(str(component_dir / GRAPH_FILE), map_location=device).eval()  # type: ignore[no-untyped-call]
            return {
                (bucket.batch_size, bucket.sequence_length): torch.jit.freeze(
                    getattr(buckets, bucket_attribute(bucket))
                )
                for bucket in component.shape_buckets
            }
        except (RuntimeError, AttributeError) as error:
            raise load_error(GRAPH_FILE, f"torch {torch.__version__}", error) from error


def _inner_values(graph: Any) -> list[Any]:
    """Return the tensors that a frozen graph computes from its inputs, in their order."""
    reached = {value.debugName() for value in graph.inputs()}
    values = []
    for node in graph.nodes():
        if reached & {value.debugName() for value in node.inputs()}:
            reached |= {value.debugName() for value in node.outputs()}
            values += [value for value in node.outputs() if value.type().kind() == "TensorType"]
    return values


def _with_outputs(graph: Any, positions: Sequence[int]) -> Any:
    """Return a function that computes those tensors of a frozen graph that have the given positions."""
    import torch

    copy = graph.copy()
    values = _inner_values(copy)
    while list(copy.outputs()):
        copy.eraseOutput(0)
    chosen = [values[position] for position in positions]
    answer = copy.appendNode(copy.create("prim::TupleConstruct", chosen, 1)).output()
    answer.setType(torch._C.TupleType([value.type() for value in chosen]))
    copy.registerOutput(answer)
    # The module itself, whose weights a frozen graph holds as constants.
    copy.eraseInput(0)
    return torch._C._create_function_from_graph("observed", copy)


def bucket_attribute(bucket: ShapeBucket) -> str:
    """Return the name under which the file holds the graph of a shape bucket."""
    return f"bucket_{bucket}"


def _trace(module: Any, tensors: tuple[Any, ...]) -> Any:
    import torch

    with warnings.catch_warnings(), torch.no_grad():
        # Shape arithmetic becomes constant, as a shape bucket intends. The tracer reads every attribute of the
        # model, including those that transformers deprecates.
        warnings.simplefilter("ignore")
        try:
            return torch.jit.trace(module, tensors, strict=False, check_trace=False)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise refusal("torch.jit.trace", error) from error


def _silence_deprecation() -> None:
    """Silence torch's warnings about torch.jit: it is deprecated since torch 2.11, but it works."""
    warnings.filterwarnings("ignore", message=r".*torch\.jit\..*deprecated.*")
