"""traceable: while torch.jit traces a model, equal calls replace those that a saved graph cannot hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class _NoContext:
    """Takes what a function of autograd stores for its gradient, and keeps nothing."""

    needs_input_grad: tuple[bool, ...] = ()

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **named_arguments: None


@contextmanager
def traceable() -> Iterator[None]:
    """Run the forward of each custom function of autograd, and scatter 0 and 1 instead of False and True.

    BLOOM and RecurrentGemma have such functions, which TorchScript cannot save. DeepSeek V3.2 scatters False, and
    no operator of TorchScript takes that.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class Numbers(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            named = dict(kwargs or {})
            if getattr(function, "__name__", "") in ("scatter", "scatter_"):
                args = tuple(int(value) if isinstance(value, bool) else value for value in args)
                if isinstance(named.get("value"), bool):
                    named["value"] = int(named["value"])
            return function(*args, **named)

    def forward(function: Any, *arguments: Any) -> Any:
        has_own_setup = function.setup_context is not torch.autograd.Function.setup_context
        return function.forward(*(() if has_own_setup else (_NoContext(),)), *arguments)

    original = torch.autograd.Function.__dict__["apply"]
    torch.autograd.Function.apply = classmethod(forward)  # type: ignore[method-assign, assignment]
    try:
        with Numbers():
            yield
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]
