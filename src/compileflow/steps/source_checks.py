"""Checks of a source model's files against a request, made before torch and transformers are imported.

A field that config.json lacks has a default that only transformers knows. What it decides is checked later.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from compileflow.contracts import Target
from compileflow.errors import SourceError, SpecError, first_line
from compileflow.source_model.decoding import refuse_decoder
from compileflow.source_model.interface import length_limit
from compileflow.source_model.interface_limits import check_interface_files
from compileflow.source_model.load import (
    missing_head,
    missing_tokenizer,
    refuse_other_head,
    refuse_quantized,
    two_parts,
    untrusted_code,
)
from compileflow.source_model.model_types import model_types
from compileflow.source_model.processor import PROCESSOR_FILES, check_processor_files
from compileflow.source_model.tasks import AUTO_CLASSES, LABELLED_TASKS
from compileflow.source_model.text_model import refuse_family, refuse_short
from compileflow.sources.files import kind_of, read_model_json
from compileflow.spec import CompileSpec, HfTask, ShapeBucket
from compileflow.steps.plan import check_timed_shapes, declared_limits, plan_components, requested_length

# Model types whose tokenizer or processor needs no file.
_WITHOUT_FILES = ("canine", "perceiver", "timm_wrapper")
_TOKENIZER_SETTINGS = "tokenizer_config.json"
# Fields of that file by what they hold.
_LENGTHS, _SIDES = ("model_max_length", "max_len"), ("padding_side", "truncation_side")
_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


class DeclaredConfig(SimpleNamespace):
    """The fields of config.json as attributes. A field that the file lacks is absent."""

    def get_text_config(self) -> DeclaredConfig:
        """Return the part that describes text, as transformers' configurations do."""
        names = ("text_encoder", "decoder", "generator", "text_config")
        parts = [part for part in (getattr(self, name, None) for name in names) if isinstance(part, dict)]
        return DeclaredConfig(**parts[0]) if len(parts) == 1 else self


def check_source(folder: Path, spec: CompileSpec, *, needs_tokenizer: bool = True) -> None:
    """Refuse a model whose files show that no target can compile it for a task.

    Args:
        folder: Folder of the source model.
        spec: What to compile.
        needs_tokenizer: Whether a text model must have a tokenizer.

    Raises:
        SpecError: The model has no head for the task, is quantized, or brings code that is not trusted.
        SourceError: transformers does not know the model, the tokenizer or the processor is missing, id2label has
            gaps, or a setting of the tokenizer is wrong.
    """
    config = read_config(folder)
    refuse_quantized(config)
    if getattr(config, "auto_map", None) and spec.trust_remote_code:
        # The code of the model decides the rest.
        return
    model_type = getattr(config, "model_type", None)
    _check_type(config, model_type, spec.hf_task)
    refuse_other_head(config, spec.hf_task)
    if spec.hf_task.graph_task in LABELLED_TASKS:
        _check_label_numbers(getattr(config, "id2label", None))
    if spec.hf_task.takes_text:
        class_name = (getattr(config, "architectures", None) or ["This model"])[0]
        refuse_family(config, class_name)
        if spec.hf_task.generates:
            types = model_types()
            is_stateful = types is not None and isinstance(model_type, str) and types.is_stateful(model_type)
            refuse_decoder(config, class_name, is_stateful=is_stateful)
        refuse_short(config)
        _check_tokenizer_settings(folder / _TOKENIZER_SETTINGS)
    if model_type in _WITHOUT_FILES:
        return
    has_tokenizer = any(kind_of(path.name) == "tokenizer" for path in folder.iterdir())
    if spec.hf_task.takes_text and needs_tokenizer and not has_tokenizer:
        raise missing_tokenizer()
    if spec.hf_task.modality != "text":
        check_processor_files(folder, "audio" if spec.hf_task.modality == "audio" else "image")


def check_model_type(target: Target, hf_task: HfTask, config: Any) -> None:
    """Refuse a model type that a target is known not to compile, or that is not among those that it compiles.

    Args:
        target: Target to compile for.
        hf_task: Task of the model.
        config: Configuration of the model, or its config.json with the fields as attributes.

    Raises:
        SpecError: The target names the type among its `refused_model_types`, or others as its
            `supported_model_types`.
    """
    model_type = getattr(config, "model_type", None)
    # Optional attribute of a target: the only types of a task.
    supported = getattr(target, "supported_model_types", {}).get(hf_task.graph_task)
    if supported is not None and model_type not in supported:
        raise SpecError(
            f"{target.name} does not compile {model_type} for {hf_task.value}; it compiles "
            f"{', '.join(supported)}.",
            hint="Choose another target; `compileflow targets` lists them.",
        )
    # Optional attribute of a target: reasons by "model type" or "task/model type".
    reasons = getattr(target, "refused_model_types", {})
    reason = reasons.get(model_type) or reasons.get(f"{hf_task.graph_task.value}/{model_type}")
    if reason:
        raise SpecError(
            f"{target.name} does not compile {model_type} for {hf_task.value}: {reason}.",
            hint="Choose another target; `compileflow targets` lists them.",
        )


def check_lengths(
    folder: Path, spec: CompileSpec, target: Target | None, *, timed_shapes: Iterable[ShapeBucket] = ()
) -> None:
    """Refuse lengths that config.json rules out.

    Args:
        folder: Folder of the source model.
        spec: What to compile.
        target: Target to compile for; None for any.
        timed_shapes: Shapes to time.

    Raises:
        SpecError: A component or a shape to time is longer than the model takes.
    """
    config = read_config(folder)
    limits = declared_limits(config, spec.hf_task, _tokenizer_maximum(folder))
    lengths = [requested_length(spec, component, limits) or limits.longest for component in spec.components]
    if target is not None:
        plan_components(spec, target, limits, threads=1)
    known_lengths = [length for length in lengths if length is not None]
    if len(known_lengths) == len(lengths):
        check_timed_shapes(timed_shapes, max(known_lengths))


def check_safe(folder: Path) -> None:
    """Refuse before the compile what a load of the artifact would refuse.

    Raises:
        SourceError: A file breaks a limit of `check_interface_files`.
    """
    try:
        check_interface_files(folder)
    except ValueError as error:
        raise SourceError(
            f"The source model is not safe to load: {first_line(error)}.",
            hint="Repair that file. If you trust the model, set trust_remote_code to true: it lifts the limits.",
        ) from error


def read_config(folder: Path) -> DeclaredConfig:
    """Read config.json.

    Raises:
        SourceError: The file is not the JSON that transformers expects.
    """
    return DeclaredConfig(**read_model_json(folder / "config.json", "config.json"))


def declared_sampling_rate(folder: Path) -> int | None:
    """Return the samples per second that the processor's files name; None if they name none."""
    for path in (folder / name for name in PROCESSOR_FILES):
        settings = read_model_json(path, path.name) if path.is_file() else {}
        for part in (settings, settings.get("feature_extractor")):
            rate = part.get("sampling_rate") if isinstance(part, dict) else None
            if isinstance(rate, int):
                return rate
    return None


def _check_type(config: DeclaredConfig, model_type: Any, hf_task: HfTask) -> None:
    """Refuse a model type that transformers does not know, or that has no head for a task."""
    types = model_types()
    code = getattr(config, "auto_map", None) or {}
    auto_class = AUTO_CLASSES[hf_task]
    if types is None:
        return
    is_known = isinstance(model_type, str) and types.knows(model_type)
    if not is_known and "AutoConfig" in code:
        raise untrusted_code()
    if not isinstance(model_type, str):
        return
    if not is_known:
        raise SourceError(
            f"transformers {types.version} does not know the model type {model_type!r} of config.json.",
            hint="Use a model that this version of transformers supports.",
        )
    supported_tasks = types.tasks(model_type)
    if supported_tasks is None:
        return
    if hf_task not in supported_tasks:
        raise untrusted_code() if auto_class in code else missing_head(model_type, hf_task, supported_tasks)
    parts = types.two_parts(model_type)
    architecture = (getattr(config, "architectures", None) or [""])[0]
    if parts is not None and auto_class == "AutoModel" and architecture in ("", parts[0]):
        raise two_parts(*parts, hf_task, lambda name: types.has_class(model_type, name))


def _check_label_numbers(labels: Any) -> None:
    """Refuse labels that a load refuses: the head of the model has one class for each label, numbered from 0."""
    if labels is None:
        return
    numbers = set(labels) if isinstance(labels, dict) else set()
    if numbers and numbers == {str(number) for number in range(len(numbers))}:
        return
    if not numbers:
        found = f"it is {json.dumps(labels)[:80]}"
        expected = "id2label in config.json must be an object with a label for each class"
    else:
        names = sorted(numbers, key=lambda name: (len(name), name))
        found = f"it names {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}"
        expected = f"id2label in config.json must name the labels 0 to {len(numbers) - 1}"
    raise SourceError(
        f"{expected}, but {found}.", hint="Number the labels from 0, in the order of the model's outputs."
    )


def _check_tokenizer_settings(path: Path) -> None:
    """Refuse settings of a tokenizer that transformers takes and then fails on, or that let no token through."""
    settings = read_model_json(path, path.name) if path.exists() else {}
    for name, value in settings.items():
        expected = _expected_setting(name, value)
        if expected:
            raise SourceError(
                f"Expected {expected} as {name} in {path.name}, got {json.dumps(value)[:80]}.",
                hint=f"Correct {path.name}, or save the tokenizer again with save_pretrained.",
            )


def _expected_setting(name: str, value: Any) -> str:
    """Return what a setting of a tokenizer must be, if it is not; "" otherwise."""
    if name in _SIDES and value not in ("right", "left"):
        return '"right" or "left"'
    if value is None:
        return ""
    if name in _LENGTHS:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return "" if is_number and value >= 1 and value == value // 1 else "a whole number of at least 1"
    if name in _TOKENS and not isinstance(value, str | dict):
        return "a text or an object"
    if name == "added_tokens_decoder" and not isinstance(value, dict):
        return "an object"
    is_list = isinstance(value, list) and all(isinstance(item, str) for item in value)
    return "a list of texts" if name == "model_input_names" and not is_list else ""


def _tokenizer_maximum(folder: Path) -> int | None:
    path = folder / _TOKENIZER_SETTINGS
    maximum: Any = read_model_json(path, path.name).get("model_max_length") if path.exists() else None
    return length_limit(maximum) if isinstance(maximum, int | float) else None
