"""Graphs that the doubles compile: TorchScript of one shape, with an operator that the runtime registers."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import torch


def register_operator(namespace: str) -> None:
    """Register the operator `<namespace>::forward_v2`, which returns its input; graphs load only with it."""
    if not hasattr(getattr(torch.ops, namespace), "forward_v2"):
        torch.library.define(f"{namespace}::forward_v2", "(Tensor x) -> Tensor")
        torch.library.impl(f"{namespace}::forward_v2", "default")(torch.clone)


def trace(module: Any, tensors: Sequence[torch.Tensor], namespace: str, **kwargs: Any) -> Any:
    """Trace a module whose outputs are a tuple, and pass each output through the namespace's operator."""
    operator = getattr(torch.ops, namespace).forward_v2

    class Compiled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = module

        def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(operator(output) for output in self.model(*inputs))

    return torch.jit.trace(Compiled().eval(), tuple(tensors), check_trace=False, **kwargs)


def fixed_shape(
    graph: Any, tensors: Sequence[torch.Tensor], *, any_batch: bool = False, inline_weights: bool = True
) -> Any:
    """Wrap a traced graph: it takes only one shape, or with `any_batch` groups rows by its batch size."""

    class FixedShape(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.neff = graph
            self.any_batch = torch.jit.Attribute(any_batch, bool)

    scripted = torch.jit.script(FixedShape())
    rows, length = tensors[0].shape
    inputs = [f"x{number}" for number in range(len(tensors))]
    outputs = [f"y{number}" for number in range(len(graph(*tensors)))]
    lines = [
        f"def forward(self, {', '.join(inputs)}):",
        *(f"    if {name}.size(1) != {length}:\n        raise ValueError('wrong length')" for name in inputs),
        f"    if x0.size(0) != {rows} and not self.any_batch:\n        raise ValueError('wrong batch size')",
        *(f"    {name}_parts = torch.jit.annotate(List[Tensor], [])" for name in outputs),
        "    start = 0",
        "    while start < x0.size(0):",
        f"        count = min({rows}, x0.size(0) - start)",
        *(f"        {name}_part = {name}[start : start + count]" for name in inputs),
        f"        if count < {rows}:",
        *(
            f"            {name}_part = torch.cat([{name}_part, {name}_part[-1:].expand([{rows} - count, -1])])"
            for name in inputs
        ),
        f"        {', '.join(outputs)}, = self.neff({', '.join(f'{name}_part' for name in inputs)})",
        *(f"        {name}_parts.append({name}[:count])" for name in outputs),
        "        start += count",
        f"    return ({', '.join(f'torch.cat({name}_parts)' for name in outputs)},)",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted.define("\n".join([*lines, ""]))
        return torch.jit.freeze(scripted.eval(), preserved_attrs=["any_batch"]) if inline_weights else scripted


class CompilerArguments(argparse.ArgumentParser):
    """A command-line parser that raises instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise RuntimeError(f"\n{self.prog}: error: {message}\n{self.format_usage()}")
