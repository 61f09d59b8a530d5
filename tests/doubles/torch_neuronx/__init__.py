"""Double of torch_neuronx 2.9, the last on PyTorch/XLA: tracing, separate weights, dynamic batches."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import neuronxcc
import torch
from double_graphs import fixed_shape, register_operator
from double_graphs import trace as trace_graph

# Arguments of each call, for the tests; the real module has no such list.
CALLS: list[dict[str, Any]] = []
_WEIGHTS = "neff.model."

register_operator("neuron")


def trace(
    func: Any,
    example_inputs: Any,
    *_: Any,
    input_output_aliases: dict[Any, int] = {},  # noqa: B006 - the documented signature
    compiler_workdir: str | None = None,
    compiler_args: str | list[str] | None = None,
    partitioner_config: Any = None,
    inline_weights_to_neff: bool = True,
    cpu_backend: bool = False,
) -> Any:
    """Compile for a NeuronCore."""
    if _:
        raise TypeError("trace() takes keyword arguments after example_inputs")
    flags = shlex.split(compiler_args) if isinstance(compiler_args, str) else list(compiler_args or [])
    values = neuronxcc.parse(flags)
    if cpu_backend and "--target" not in flags:
        raise ValueError("cpu_backend needs --target in compiler_args")
    tensors = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    CALLS.append(
        {
            "call": "trace",
            "shape": tuple(tensors[0].shape),
            "flags": flags,
            "values": values,
            "inline_weights_to_neff": inline_weights_to_neff,
            "cpu_backend": cpu_backend,
            "threads": torch.get_num_threads(),
        }
    )
    (Path(compiler_workdir or ".") / "graph.neff").write_bytes(b"NEFF")
    Path(values.logfile).write_text("compiled\n")
    graph = trace_graph(func, tensors, "neuron")
    return fixed_shape(graph, tensors, inline_weights=inline_weights_to_neff)


def dynamic_batch(neuron_script: Any) -> Any:
    """Let a graph take any batch size. Changes the graph in place."""
    CALLS.append({"call": "dynamic_batch"})
    neuron_script._c.setattr("any_batch", True)
    return neuron_script


def async_load(trace: Any, enable_async_load: bool = True) -> None:
    """Load onto the device in the background."""
    CALLS.append({"call": "async_load", "enabled": enable_async_load})


def lazy_load(trace: Any, enable_lazy_load: bool = True) -> None:
    """Load onto the device at the first call."""
    CALLS.append({"call": "lazy_load", "enabled": enable_lazy_load})


def replace_weights(neuron_model: Any, weights: Any) -> None:
    """Replace the weights of a graph by those of a module, or of a state_dict with every name of the graph."""
    state = weights.state_dict() if isinstance(weights, torch.nn.Module) else weights
    names = [name for name, _ in neuron_model.named_parameters(remove_duplicate=False)]
    if not names:
        raise RuntimeError("the model has no separated weights")
    for name in names:
        *path, leaf = name.split(".")
        holder = neuron_model
        for step in path:
            holder = getattr(holder, step)
        holder._c.setattr(leaf, state[name.removeprefix(_WEIGHTS)])


def move_trace_to_device(trace: Any, device_id: int) -> None:
    """Move a graph, with its separated weights, to one NeuronCore."""
    CALLS.append({"call": "move_trace_to_device", "device_id": device_id})
