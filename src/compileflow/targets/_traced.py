"""Graphs that torch.jit traced: names that it can read back, and TracedRunner, which runs one for each bucket."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from numpy.typing import NDArray

from compileflow.contracts import Arrays, ComponentRecord
from compileflow.contracts.toolkit import require_open, torch_threads
from compileflow.errors import InputError
from compileflow.source_model.lengths import call_sizes

Shape = tuple[int, int]


@contextmanager
def readable_class_names(module: Any) -> Iterator[None]:
    """Rename the Python modules of a model's classes, inside the block, to names that TorchScript can read.

    A traced graph holds the module path of each class. transformers names the module of a model's own code after
    its folder or a hash, and torch.jit.load cannot read a part of the path that begins with a digit.
    """
    classes = {type(part) for part in module.modules()}
    names = {cls: cls.__module__ for cls in classes if not all(map(str.isidentifier, cls.__module__.split(".")))}
    try:
        for cls, name in names.items():
            cls.__module__ = ".".join(f"_{re.sub(r'[^A-Za-z0-9_]', '_', part)}" for part in name.split("."))
        yield
    finally:
        for cls, name in names.items():
            cls.__module__ = name


class TracedRunner:
    """Runs the graph whose shape bucket the inputs have.

    Args:
        graphs: Graph of each (batch size, sequence length).
        component: Interface of the graphs.
        device: Device that torch copies the inputs to; cpu for a runtime that moves tensors itself.
        any_batch: A graph also takes batch sizes other than the one it was traced with.
        queued: Concurrent calls wait for one another.
        threads: Number of torch threads of a call; None leaves torch's setting.
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
        self._graphs: dict[Shape, Any] | None = dict(graphs)
        self._component = component
        self._device = device
        self._any_batch = any_batch
        self._lock = threading.Lock() if queued else None
        self._threads = threads

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """Map named inputs, in the shape of a bucket, to named float32 outputs."""
        import torch

        graphs = require_open(self._graphs)
        records = self._component.inputs
        graph = self._graph(graphs, call_sizes(records[0], inputs[records[0].name]))
        tensors = [torch.as_tensor(inputs[record.name]).to(self._device) for record in records]
        with self._lock or nullcontext(), torch.inference_mode(), torch_threads(self._threads):
            answers = graph(*tensors)
        if isinstance(answers, torch.Tensor):
            answers = (answers,)
        return {
            record.name: answer.float().cpu().numpy()
            for record, answer in zip(self._component.outputs, answers, strict=True)
        }

    def close(self) -> None:
        """Release the graphs."""
        self._graphs = None

    def _graph(self, graphs: Mapping[Shape, Any], shape: Shape) -> Any:
        if shape in graphs:
            return graphs[shape]
        rows, length = shape
        batch_sizes = [bucket[0] for bucket in graphs if bucket[1] == length]
        if self._any_batch and batch_sizes:
            return graphs[min(batch_sizes, key=lambda size: abs(size - rows)), length]
        buckets = ", ".join(f"{batch_size}x{sequence_length}" for batch_size, sequence_length in sorted(graphs))
        raise InputError(
            f"Expected inputs in one of the shape buckets {buckets}, got shape {rows}x{length}.",
            hint="Call the component through CompiledModel, which pads to a shape bucket.",
        )
