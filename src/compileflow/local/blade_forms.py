"""The forms of BladeDISC's adapter for transformers: its settings, and `ModelInfo` on what `optimize` returns."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from compileflow._process.folders import path_of_uri
from compileflow.errors import LoadError, SpecError
from compileflow.serving.model import FLAGS, CompiledModel
from compileflow.source_model.examples import example_inputs
from compileflow.source_model.token_rows import token_rows
from compileflow.spec import Precision

logger = logging.getLogger(__name__)
# Arguments of from_pretrained that change where or how weights are loaded, but no answer of the compiled model.
_LOADING_ARGUMENTS = {
    "attn_implementation", "cache_dir", "device_map", "local_files_only", "low_cpu_mem_usage", "return_dict",
    "torchscript", "use_safetensors",
}  # fmt: skip
# Tokens per row of an example.
_EXAMPLE_TOKENS = 16


@dataclass(frozen=True)
class ModelInfo:
    """What BladeDISC's adapter tells about an optimized model.

    Attributes:
        task: Task of the model.
        id_or_path: Hub id or folder of the source model; "" for a model in memory without a name.
        config: Configuration of the source model.
        model_class: Class of the source model.
        example_inputs: Tensors by name, which the optimized model and the source model take.
        input_order: Names of the inputs in the order of the source model's forward.
        forward_default_kwargs: Arguments of forward for calls that leave them out; a callable is called each time.
        output_names: Names of the outputs.
    """

    task: str
    id_or_path: str
    config: Any
    model_class: Any
    example_inputs: dict[str, Any]
    input_order: list[str]
    forward_default_kwargs: dict[str, Any]
    output_names: list[str]


@dataclass(frozen=True)
class Forms:
    """Settings of the adapter that decide how an optimized model is called.

    Attributes:
        example_inputs: Example tensors, or callables that return them, by name; None: generated ones.
        output_names: Names of the outputs to return; None: all.
        forward_default_kwargs: See `ModelInfo`.
        memory_name: Hub id or folder that a model in memory was loaded from.
    """

    example_inputs: Mapping[str, Any] | None = None
    output_names: Sequence[str] | None = None
    forward_default_kwargs: Mapping[str, Any] = field(default_factory=dict)
    memory_name: str = ""

    def info(self, compiled_model: CompiledModel, model_class: Any) -> ModelInfo:
        """Check the settings against a compiled model, and return what the adapter tells about it.

        Raises:
            SpecError: A setting names an argument or an output that the model does not have.
        """
        record, manifest = compiled_model.graph.record, compiled_model.manifest
        parameters = [name for name in inspect.signature(model_class.forward).parameters if name != "self"]
        outputs = [tensor.name for tensor in record.outputs]
        for names, known_names, setting in (
            (self.example_inputs or (), parameters, "example_inputs"),
            (self.forward_default_kwargs, [*parameters, *FLAGS, "return_dict"], "forward_default_kwargs"),
            (self.output_names or (), outputs, "output_names"),
        ):
            unknown_names = [name for name in names if name not in known_names]
            if unknown_names:
                raise SpecError(
                    f"{setting} has {unknown_names[0]!r}, which {model_class.__name__} does not have.",
                    hint=f"Choose from: {', '.join(known_names)}.",
                )
        examples = (
            _generated(compiled_model)
            if self.example_inputs is None
            else {name: value() if callable(value) else value for name, value in self.example_inputs.items()}
        )
        return ModelInfo(
            task=manifest.hf_task.value,
            id_or_path=_location(manifest.source.uri) or self.memory_name,
            config=compiled_model.config,
            model_class=model_class,
            example_inputs=examples,
            input_order=[name for name in parameters if name in examples],
            forward_default_kwargs=dict(self.forward_default_kwargs),
            output_names=list(self.output_names or outputs),
        )


def load_settings(model_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the settings of `pipeline` and `optimize` that `model_kwargs` stands for.

    Raises:
        SpecError: An argument would change the model in a way that compileflow does not support.
    """
    arguments = dict(model_kwargs or {})
    supported = ("revision", "trust_remote_code")
    settings: dict[str, Any] = {name: arguments.pop(name) for name in supported if name in arguments}
    ignored = sorted(_LOADING_ARGUMENTS & arguments.keys())
    unknown = sorted(arguments.keys() - _LOADING_ARGUMENTS)
    if unknown:
        raise SpecError(
            f"model_kwargs has {unknown[0]!r}, which compileflow does not support.",
            hint="It supports revision and trust_remote_code, and ignores: "
            f"{', '.join(sorted(_LOADING_ARGUMENTS))}.",
        )
    if ignored:
        logger.info("model_kwargs: ignored, because they do not change a compiled model: %s", ", ".join(ignored))
    return settings


def autocast_precision(precision: Precision | str, target: str, *, amp: bool) -> Precision | str:
    """Return the precision; amp=True without another precision is the one that autocast computes in."""
    if not amp or precision != Precision.FP32:
        return precision
    return Precision.FP16 if target == "blade" else Precision.BF16


def check_device(device: Any) -> None:
    """Check that a device is the CPU, from which compiled models take their tensors.

    Raises:
        LoadError: It is another device.
    """
    if device not in (None, -1) and str(device) != "cpu":
        raise LoadError(
            f"A compiled model takes its tensors from the CPU, got device={str(device)!r}.",
            hint="Leave device out; the target decides where the model runs.",
        )


def _generated(compiled_model: CompiledModel) -> dict[str, Any]:
    import torch

    record, manifest = compiled_model.graph.record, compiled_model.manifest
    is_text = manifest.hf_task.modality == "text"
    tokens = token_rows(None, compiled_model.config, record.vocab_size, manifest.hf_task) if is_text else None
    length = min(_EXAMPLE_TOKENS, record.max_sequence_length) if is_text else record.max_sequence_length
    arrays = example_inputs(record.inputs, 1, length, tokens)
    return {name: torch.as_tensor(value) for name, value in arrays.items()}


def _location(uri: str) -> str:
    if uri.startswith("file:"):
        return str(path_of_uri(uri))
    return "" if uri.startswith("memory:") else uri.removeprefix("hf://")
