"""as_source_class: an instance of the source model's class that has no weights and runs the compiled model."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from compileflow.errors import InputError, SpecError
from compileflow.local.blade_forms import Forms
from compileflow.serving.model import CompiledModel, FixedModule
from compileflow.source_model.tasks import model_class_of

_NO_FORMS = Forms()


def as_source_class(compiled_model: CompiledModel, forms: Forms = _NO_FORMS) -> Any:
    """Return an instance of the source model's class that answers like `compiled_model`.

    Raises:
        SpecError: The source model's class is not part of transformers, or the forms do not fit the model.
    """
    # Imported here, because importing the base class imports torch.
    import torch

    source_class = _source_class(compiled_model)
    generates = compiled_model.manifest.hf_task.generates
    bases = (_OptimizedDecoder if generates else _Optimized, source_class)
    kind: Any = type(source_class.__name__, bases, {"__module__": source_class.__module__})
    optimized = kind.__new__(kind)
    # Not __init__ of the source class, which would create the weights.
    torch.nn.Module.__init__(optimized)
    optimized.training = False
    optimized.config = compiled_model.config
    optimized.name_or_path = compiled_model.name_or_path
    optimized.generation_config = compiled_model.generation_config
    # Not a submodule, which would be looked up more slowly in each call.
    vars(optimized).update(
        compiled=compiled_model,
        forms=forms,
        info=forms.info(compiled_model, source_class),
        opt_model=compiled_model,
    )
    return optimized


class _Optimized(FixedModule):
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
        for name, value in self.forms.forward_default_kwargs.items():
            if inputs.get(name) is None:
                inputs[name] = value() if callable(value) else value
        if inputs.get("labels") is not None:
            raise InputError(
                "A compiled model does not compute a loss, so it does not take labels.",
                hint="Train and evaluate losses with the source model.",
            )
        inputs = {name: value for name, value in inputs.items() if value is not None}
        if self.forms.output_names is None:
            return self.compiled(**inputs)
        return_dict = inputs.pop("return_dict", True)
        outputs = self.compiled(**inputs)
        chosen = type(outputs)(**{name: outputs[name] for name in self.forms.output_names})
        return chosen if return_dict else chosen.to_tuple()

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

    def __reduce__(self: Any) -> tuple[Any, ...]:
        # pickle would look for the subclass by its name.
        return as_source_class, (self.compiled,)

    def __repr__(self: Any) -> str:
        return f"{type(self).__name__}(compiled for {self.compiled.manifest.target.name})"


class _OptimizedDecoder(_Optimized):
    """The same for a decoder, whose cache is the compiled model's."""

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Generate with the compiled model; the arguments are those of transformers."""
        return self.compiled.generate(*args, **kwargs)


def _source_class(model: CompiledModel) -> Any:
    import transformers
    from transformers.models.auto.auto_factory import _get_model_class

    model_class = model_class_of(model.config, model.manifest.hf_task)
    if issubclass(model_class, transformers.PreTrainedModel):
        return model_class
    auto_class, mapping = model_class.__name__, model_class._model_mapping
    if type(model.config) not in mapping:
        raise SpecError(
            f"{auto_class} has no class for {type(model.config).__name__}, because the model has custom code.",
            hint="Use compileflow.pipeline or CompiledModel, which do not need the class.",
        )
    return _get_model_class(model.config, mapping)
