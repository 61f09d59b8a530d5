"""Double of torch_neuron 1.13: `torch_neuron.trace`, which is `torch.neuron.trace` once this is imported."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import neuroncc
import torch
from double_graphs import fixed_shape, register_operator
from double_graphs import trace as trace_graph

# Arguments of each call, for the tests; the real module has no such list.
CALLS: list[dict[str, Any]] = []
# TorchScript operators that this Inf1 lacks; tests add some.
UNSUPPORTED: set[str] = set()

register_operator("neuron")
torch.neuron = sys.modules[__name__]


def trace(
    model: Any,
    example_inputs: Any,
    *,
    compiler_args: list[str] | None = None,
    compiler_timeout: int | None = None,
    compiler_workdir: str | None = None,
    subgraph_builder_function: Any = None,
    minimum_segment_size: int = 2,
    single_fusion_ratio_threshold: float = 0.6,
    fallback: bool = True,
    dynamic_batch_size: bool = False,
    optimizations: list[Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Compile. torch.jit.trace gets the other keywords, and refuses unknown ones."""
    values = neuroncc.parse(compiler_args or [])
    tensors = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    CALLS.append(
        {
            "shape": tuple(tensors[0].shape),
            "flags": list(compiler_args or []),
            "fast_math": values.fast_math,
            "fallback": fallback,
            "dynamic_batch_size": dynamic_batch_size,
            "threads": torch.get_num_threads(),
        }
    )
    # The compiler writes its log and graphs there; without a folder, into the working folder.
    (Path(compiler_workdir or ".") / "graph_def.neff").write_bytes(b"NEFF")
    graph = trace_graph(model, tensors, "neuron", **kwargs)
    unsupported = {node.kind() for node in graph.inlined_graph.nodes()} & UNSUPPORTED
    if unsupported and not fallback:
        raise AttributeError(f"Neuron does not support the operator {min(unsupported)}\nand fallback is off")
    return fixed_shape(graph, tensors, any_batch=dynamic_batch_size)
