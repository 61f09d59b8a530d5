"""Graphs that a vendor's compiler traces, one for each shape bucket, each in its own file: compile and load."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compileflow.contracts import ComponentPlan, ComponentRecord
from compileflow.contracts.toolkit import load_error, report_progress, torch_threads
from compileflow.source_model import SourceModel
from compileflow.spec import ShapeBucket
from compileflow.targets._traced import readable_class_names
from compileflow.targets._vendor.toolchain import vendor_call


def compile_buckets(
    source_model: SourceModel,
    plan: ComponentPlan,
    out_dir: Path,
    *,
    compiler: str,
    trace: Callable[[tuple[Any, ...], Path], Any],
) -> tuple[str, ...]:
    """Trace one graph for each shape bucket, save each in its own file, and return the names of the files.

    Args:
        source_model: The source model.
        plan: The shape buckets and the number of threads.
        out_dir: Folder that the files are written to.
        compiler: Name of the vendor's function, for errors.
        trace: Returns the traced graph, given the example tensors and a scratch folder.

    Raises:
        CompileError: The compiler refused the model.
    """
    import torch

    files = []
    with torch_threads(plan.threads), tempfile.TemporaryDirectory(prefix=".compiler-", dir=out_dir) as scratch:
        for number, bucket in enumerate(plan.shape_buckets, start=1):
            report_progress(f"compiling shape bucket {bucket} ({number} of {len(plan.shape_buckets)})")
            example = source_model.example_tensors(bucket.batch_size, bucket.sequence_length)
            bucket_scratch = Path(scratch) / str(bucket)
            bucket_scratch.mkdir()
            with vendor_call(compiler), readable_class_names(source_model.model):
                graph = trace(tuple(example.values()), bucket_scratch)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.jit.save(graph, str(out_dir / bucket_file(bucket)))
            files.append(bucket_file(bucket))
    return tuple(files)


def load_buckets(
    component_dir: Path,
    component: ComponentRecord,
    *,
    runtime: str,
    map_location: str | None = None,
    prepare: Callable[[Any], Any] = lambda graph: graph,
) -> dict[tuple[int, int], Any]:
    """Load the graph of every shape bucket. Import the vendor's runtime first.

    Args:
        component_dir: Folder of the component.
        component: Record of the component.
        runtime: Name of the vendor's runtime, for errors.
        map_location: Device that torch loads the graphs onto.
        prepare: Called with each graph; returns the graph that is kept.

    Returns:
        (batch size, sequence length) to graph.

    Raises:
        LoadError: A file is damaged, or was written by an incompatible version.
    """
    import torch

    graphs = {}
    for bucket in component.shape_buckets:
        name = bucket_file(bucket)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                graph = torch.jit.load(str(component_dir / name), map_location=map_location)  # type: ignore[no-untyped-call]
                graphs[bucket.batch_size, bucket.sequence_length] = prepare(graph.eval())
        except Exception as error:
            raise load_error(name, f"{runtime} with torch {torch.__version__}", error) from error
    return graphs


def bucket_file(bucket: ShapeBucket) -> str:
    """Return the name of the file that holds the graph of a shape bucket."""
    return f"bucket_{bucket}.pt"
