"""Graphs that a vendor's compiler traced, one a shape bucket: compile, save, load and run them."""

from __future__ import annotations

import tempfile
import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

from numpy.typing import NDArray

from compileflow.contracts import Arrays, ComponentPlan, ComponentRecord
from compileflow.contracts.toolkit import report_progress, torch_threads
from compileflow.errors import InputError, LoadError, first_line
from compileflow.source_model import SourceModel, example_inputs
from compileflow.spec import ShapeBucket
from compileflow.targets._vendor.toolchain import vendor_call

Shape = tuple[int, int]


def compile_buckets(
    graph: SourceModel,
    plan: ComponentPlan,
    out_dir: Path,
    *,
    compiler: str,
    trace: Callable[[tuple[Any, ...], Path], Any],
) -> tuple[str, ...]:
    """Trace and save one graph a shape bucket, each in a file of its own.

    Args:
        graph: The source model.
        plan: Its shape buckets and threads.
        out_dir: Where the files go.
        compiler: The vendor's call, for progress lines and errors.
        trace: Given the example tensors and a scratch folder, returns the traced graph.

    Returns:
        The names of the files.
    """
    import torch

    files = []
    with torch_threads(plan.threads), tempfile.TemporaryDirectory(prefix=".compiler-", dir=out_dir) as scratch:
        for number, bucket in enumerate(plan.shape_buckets, start=1):
            report_progress(f"compiling shape bucket {bucket} ({number} of {len(plan.shape_buckets)})")
            example = example_inputs(
                graph.inputs, bucket.batch_size, bucket.sequence_length, graph.vocab_size, graph.pad_token_id
            )
            tensors = tuple(torch.as_tensor(example[record.name]) for record in graph.inputs)
            work = Path(scratch) / str(bucket)
            work.mkdir()
            with vendor_call(compiler):
                traced = trace(tensors, work)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.jit.save(traced, str(out_dir / bucket_file(bucket)))
            files.append(bucket_file(bucket))
    return tuple(files)


def load_buckets(
    component_dir: Path,
    component: ComponentRecord,
    *,
    runtime: str,
    map_location: str | None = None,
    prepare: Callable[[Any], Any] = lambda graph: graph,
) -> dict[Shape, Any]:
    """Load the graph of every shape bucket; the vendor's runtime must be imported already.

    Raises:
        LoadError: a file is no graph, or of another version.
    """
    import torch

    graphs = {}
    for bucket in component.shape_buckets:
        name = bucket_file(bucket)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loaded = torch.jit.load(str(component_dir / name), map_location=map_location)  # type: ignore[no-untyped-call]
                graphs[bucket.batch_size, bucket.sequence_length] = prepare(loaded.eval())
        except Exception as error:
            raise LoadError(
                f"{name} cannot be loaded by {runtime} with torch {torch.__version__}: {first_line(error)}.",
                hint="Use the versions that the manifest names, or compile again.",
            ) from error
    return graphs


class TracedRunner:
    """Runs the graph whose shape the inputs have.

    Args:
        graphs: (batch size, sequence length) to graph.
        component: The graphs' interface.
        device: Where torch puts the inputs. The runtimes that move tensors themselves take them from the CPU.
        any_batch: Whether a graph takes other batch sizes than its own.
        queued: Whether calls wait for one another.
        threads: Threads of one call; needs `queued`, since the number is the process's.
    """

    def __init__(
        self,
        graphs: Mapping[Shape, Any],
        component: ComponentRecord,
        *,
        device: str = "cpu",
        any_batch: bool = False,
        queued: bool = False,
        threads: int | None = None,
    ):
        self._graphs = dict(graphs)
        self._component = component
        self._device = device
        self._any_batch = any_batch
        self._lock = threading.Lock() if queued else None
        self._threads = threads if queued else None

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """Map named inputs, int64 arrays of shape (batch, sequence), to named float32 outputs."""
        import torch

        graphs = self._graphs
        if not graphs:
            raise InputError("This compiled model was closed.", hint="Load it again.")
        names = [record.name for record in self._component.inputs]
        graph = self._graph(graphs, cast("Shape", inputs[names[0]].shape))
        tensors = [torch.as_tensor(inputs[name]).to(self._device) for name in names]
        with self._lock or nullcontext(), torch.inference_mode(), torch_threads(self._threads):
            answers = graph(*tensors)
        if isinstance(answers, torch.Tensor):
            answers = (answers,)
        return {
            record.name: answer.float().cpu().numpy()
            for record, answer in zip(self._component.outputs, answers, strict=True)
        }

    def close(self) -> None:
        """Let go of the graphs."""
        self._graphs = {}

    def _graph(self, graphs: Mapping[Shape, Any], shape: Shape) -> Any:
        if shape in graphs:
            return graphs[shape]
        same_length = [size for size in graphs if size[1:] == shape[1:]]
        if self._any_batch and same_length:
            return graphs[min(same_length, key=lambda size: abs(size[0] - shape[0]))]
        raise InputError(
            f"Shape {shape} is no shape bucket of this graph.",
            hint="Call it through CompiledModel, which pads to a bucket.",
        )


def bucket_file(bucket: ShapeBucket) -> str:
    """Return the name of a bucket's file."""
    return f"bucket_{bucket}.pt"
