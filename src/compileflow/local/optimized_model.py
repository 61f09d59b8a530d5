"""OptimizedModel: an instance of the source model's own class that has no weights and runs the compiled graph."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from compileflow.errors import InputError, LoadError, SpecError
from compileflow.serving.model import CompiledModel
from compileflow.source_model.tasks import AUTO_CLASSES


def as_source_class(compiled: CompiledModel) -> Any:
    """Return an object for which isinstance(object, type(source model)) holds, and which answers like `compiled`.

    Raises:
        SpecError: the source model's class is no class of transformers.
    """
    # Here, since importing the base class imports torch.
    import torch

    source_class = _source_class(compiled)
    kind: Any = type(source_class.__name__, (_Optimized, source_class), {"__module__": source_class.__module__})
    optimized = kind.__new__(kind)
    # Not the source class's own __init__, which would make the weights.
    torch.nn.Module.__init__(optimized)
    optimized.training = False
    optimized.config = compiled.config
    optimized.name_or_path = compiled.name_or_path
    optimized.generation_config = None
    optimized.compiled = compiled
    return optimized


class _Optimized:
    """What differs from the source class; stands before it in the order of method resolution."""

    @property
    def device(self: Any) -> Any:
        """Where tensors go in and come out."""
        return self.compiled.device

    @property
    def dtype(self: Any) -> Any:
        """Type of the outputs."""
        return self.compiled.dtype

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the compiled graph on what the source model's forward takes, by position or by name.

        Raises:
            InputError: an input or an output that the graph lacks.
        """
        signature = inspect.signature(super().forward)  # type: ignore[misc]
        try:
            bound = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise InputError(
                f"{type(self).__name__} was called with other arguments than its own: {error}.",
                hint=f"It takes: {', '.join(signature.parameters)}.",
            ) from error
        named: dict[str, Any] = {}
        for name, value in bound.items():
            var_keyword = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
            named |= value if var_keyword else {name: value}
        if named.get("labels") is not None:
            raise InputError(
                "labels were given, and a compiled graph gives no loss.",
                hint="Train and evaluate losses with the source model.",
            )
        return self.compiled(**named)

    def train(self: Any, mode: bool = True) -> Any:
        """Return itself for mode False.

        Raises:
            InputError: a compiled graph cannot be trained.
        """
        if mode:
            raise InputError(
                "A compiled graph has no parameters and cannot be trained.", hint="Train the source model."
            )
        return self

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Return itself if it is there and of that type already.

        Raises:
            LoadError: a loaded graph can be neither moved nor converted.
        """
        import torch

        for asked in (*args, *kwargs.values()):
            if isinstance(asked, torch.dtype):
                if asked is not self.dtype:
                    raise LoadError(
                        f"The compiled graph gives {self.dtype}, and cannot be converted to {asked}.",
                        hint="Optimize with another precision=.",
                    )
            elif isinstance(asked, str | int | torch.device) and not isinstance(asked, bool):
                self.compiled.to(asked)
        return self

    def cuda(self: Any, device: Any = None) -> Any:
        """Refuse, unless it runs there."""
        return self.to("cuda" if device is None else device)

    def half(self: Any) -> Any:
        """Refuse: precision is chosen before compiling."""
        import torch

        return self.to(torch.float16)

    def bfloat16(self: Any) -> Any:
        """Refuse: precision is chosen before compiling."""
        import torch

        return self.to(torch.bfloat16)

    def double(self: Any) -> Any:
        """Refuse: precision is chosen before compiling."""
        import torch

        return self.to(torch.float64)

    def save_pretrained(self: Any, dest: str | Path, **_: Any) -> Path:
        """Copy the whole artifact into `dest`, an empty or absent folder."""
        path: Path = self.compiled.save_pretrained(dest)
        return path

    @classmethod
    def from_pretrained(cls, location: str | Path, **settings: Any) -> Any:
        """Load what `save_pretrained` wrote; settings as `CompiledModel.from_pretrained` has them."""
        return as_source_class(CompiledModel.from_pretrained(location, **settings))

    def __getattr__(self: Any, name: str) -> Any:
        try:
            return super().__getattr__(name)  # type: ignore[misc]
        except AttributeError:
            # What the source class's __init__ takes over from its configuration, such as num_labels.
            config = self.__dict__.get("config")
            if config is None or not hasattr(config, name):
                raise
            return getattr(config, name)

    def __repr__(self: Any) -> str:
        return f"{type(self).__name__}(compiled for {self.compiled.manifest.target.name})"


def _source_class(compiled: CompiledModel) -> Any:
    import transformers
    from transformers.models.auto.auto_factory import _get_model_class

    auto_class = AUTO_CLASSES[compiled.manifest.hf_task]
    mapping = getattr(transformers, auto_class)._model_mapping
    if type(compiled.config) not in mapping:
        raise SpecError(
            f"{auto_class} has no class for {type(compiled.config).__name__}: the model brings its own code.",
            hint="Use compileflow.pipeline or CompiledModel, which need no such class.",
        )
    return _get_model_class(compiled.config, mapping)
