"""as_source_class: an instance of the source model's class that has no weights and runs the compiled model."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from compileflow.errors import InputError, LoadError, SpecError
from compileflow.serving.model import CompiledModel
from compileflow.source_model.tasks import AUTO_CLASSES


def as_source_class(compiled_model: CompiledModel) -> Any:
    """Return an instance of the source model's class that answers like `compiled_model`.

    Raises:
        SpecError: The source model's class is not part of transformers.
    """
    # Imported here, because importing the base class imports torch.
    import torch

    source_class = _source_class(compiled_model)
    kind: Any = type(source_class.__name__, (_Optimized, source_class), {"__module__": source_class.__module__})
    optimized = kind.__new__(kind)
    # Not __init__ of the source class, which would create the weights.
    torch.nn.Module.__init__(optimized)
    optimized.training = False
    optimized.config = compiled_model.config
    optimized.name_or_path = compiled_model.name_or_path
    optimized.generation_config = None
    optimized.compiled = compiled_model
    return optimized


class _Optimized:
    """Methods that override those of the source class; comes first in the method resolution order."""

    @property
    def device(self: Any) -> Any:
        """Device of the inputs and outputs."""
        return self.compiled.device

    @property
    def dtype(self: Any) -> Any:
        """Data type of the outputs."""
        return self.compiled.dtype

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the compiled model on the arguments of the source model's forward, by position or by name.

        Raises:
            InputError: The compiled model does not have an input or an output.
        """
        signature = inspect.signature(super().forward)  # type: ignore[misc]
        try:
            bound = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise InputError(
                f"{type(self).__name__} cannot be called with these arguments: {error}.",
                hint=f"Its arguments are: {', '.join(signature.parameters)}.",
            ) from error
        inputs: dict[str, Any] = {}
        for name, value in bound.items():
            var_keyword = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
            inputs |= value if var_keyword else {name: value}
        if inputs.get("labels") is not None:
            raise InputError(
                "A compiled model does not compute a loss, so it does not take labels.",
                hint="Train and evaluate losses with the source model.",
            )
        return self.compiled(**inputs)

    def train(self: Any, mode: bool = True) -> Any:
        """Return this object for mode False.

        Raises:
            InputError: The mode is True; a compiled model cannot be trained.
        """
        if mode:
            raise InputError(
                "A compiled model has no parameters and cannot be trained.", hint="Train the source model."
            )
        return self

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Return this object if it already has that device and type.

        Raises:
            LoadError: A compiled model cannot be moved or converted.
        """
        import torch

        for argument in (*args, *kwargs.values()):
            if isinstance(argument, torch.dtype):
                if argument is not self.dtype:
                    raise LoadError(
                        f"The compiled model returns {self.dtype} and cannot be converted to {argument}.",
                        hint="Optimize with another precision=.",
                    )
            elif isinstance(argument, str | int | torch.device) and not isinstance(argument, bool):
                self.compiled.to(argument)
        return self

    def cuda(self: Any, device: Any = None) -> Any:
        """Raise LoadError unless the model takes its tensors there."""
        return self.to("cuda" if device is None else device)

    def half(self: Any) -> Any:
        """Raise LoadError, because the precision is chosen before compiling."""
        import torch

        return self.to(torch.float16)

    def bfloat16(self: Any) -> Any:
        """Raise LoadError, because the precision is chosen before compiling."""
        import torch

        return self.to(torch.bfloat16)

    def double(self: Any) -> Any:
        """Raise LoadError, because the precision is chosen before compiling."""
        import torch

        return self.to(torch.float64)

    def save_pretrained(self: Any, dest: str | Path, **_: Any) -> Path:
        """Copy the whole artifact into `dest`, an empty or absent folder."""
        path: Path = self.compiled.save_pretrained(dest)
        return path

    @classmethod
    def from_pretrained(cls, location: str | Path, **settings: Any) -> Any:
        """Load a saved artifact; the settings are those of `CompiledModel.from_pretrained`."""
        return as_source_class(CompiledModel.from_pretrained(location, **settings))

    def __getattr__(self: Any, name: str) -> Any:
        try:
            return super().__getattr__(name)  # type: ignore[misc]
        except AttributeError:
            # Attributes that __init__ of the source class copies from its configuration, such as num_labels.
            config = self.__dict__.get("config")
            if config is None or not hasattr(config, name):
                raise
            return getattr(config, name)

    def __repr__(self: Any) -> str:
        return f"{type(self).__name__}(compiled for {self.compiled.manifest.target.name})"


def _source_class(model: CompiledModel) -> Any:
    import transformers
    from transformers.models.auto.auto_factory import _get_model_class

    auto_class = AUTO_CLASSES[model.manifest.hf_task]
    mapping = getattr(transformers, auto_class)._model_mapping
    if type(model.config) not in mapping:
        raise SpecError(
            f"{auto_class} has no class for {type(model.config).__name__}, because the model has custom code.",
            hint="Use compileflow.pipeline or CompiledModel, which do not need the class.",
        )
    return _get_model_class(model.config, mapping)
