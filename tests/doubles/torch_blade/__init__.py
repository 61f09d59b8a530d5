"""Double of torch_blade, BladeDISC for PyTorch: `optimize` and `Config`."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from double_graphs import fixed_shape, register_operator
from double_graphs import trace as trace_graph
from torch_blade import config
from torch_blade.config import Config

__all__ = ["CALLS", "Config", "config", "optimize"]

# Arguments of each call, for the tests; the real module has no such list.
CALLS: list[dict[str, Any]] = []

register_operator("torch_blade")
# The real module also sets this filter.
warnings.filterwarnings("ignore")


def optimize(model: Any, allow_tracing: Any = None, model_inputs: Any = None) -> Any:
    """Trace and optimize under the configuration of the innermost `with`."""
    if allow_tracing is None:
        raise RuntimeError("torch.jit.script refused the model, and tracing is not allowed")
    assert model_inputs is not None, "model_inputs must be provided where tracing is allowed"
    settings = Config.get_current_context_or_new()
    CALLS.append(
        {
            "shape": tuple(model_inputs[0].shape),
            "device": model_inputs[0].device.type,
            "config": settings.as_dict(),
            "threads": torch.get_num_threads(),
        }
    )
    graph = trace_graph(model, tuple(model_inputs), "torch_blade")
    return fixed_shape(graph, tuple(model_inputs))
