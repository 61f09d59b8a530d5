"""all_classes: the model classes that transformers has for the tasks that compileflow compiles."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.architectures.tiny_models import ModelClass
from compileflow.contracts.digests import json_digest
from compileflow.source_model.tasks import AUTO_CLASSES
from compileflow.spec import GRAPH_TASKS, HfTask

# Main inputs of each modality. Other classes of an auto class's mapping belong to another task.
_MAIN_INPUTS: Mapping[str, tuple[str, ...]] = {
    "text": ("input_ids", "inputs"),
    "image": ("pixel_values", "inputs", "input_ids"),
    "image-text": ("pixel_values", "input_ids"),
    "audio": ("input_values", "input_features", "input_ids"),
}


# The list of decoders follows from these.
DECODER_TASKS = (HfTask.TEXT_GENERATION, HfTask.FILL_MASK)
# Decoders that generate have a table of their own.
_TASKS = tuple(task for task in AUTO_CLASSES if task in GRAPH_TASKS and not task.generates)


def all_classes() -> list[ModelClass]:
    """Return one entry for each graph task and model type, in the order of transformers' mappings.

    Decoders that generate stand in `decoder_classes`.
    """
    return _classes(task for task in _TASKS if task.modality in _MAIN_INPUTS)


def decoder_classes() -> list[ModelClass]:
    """Return one entry for each model type that has a causal head and no head that fills masks.

    The others are encoders, whose causal head serves as the decoder of a model of two parts.
    """
    import transformers

    encoders = transformers.AutoModelForMaskedLM._model_mapping._model_mapping
    classes = _classes([HfTask.TEXT_GENERATION])
    return [model_class for model_class in classes if model_class.model_type not in encoders]


def _classes(tasks: Iterable[HfTask]) -> list[ModelClass]:
    import transformers

    classes = []
    for hf_task in tasks:
        mapping = getattr(transformers, AUTO_CLASSES[hf_task])._model_mapping
        main_inputs = _MAIN_INPUTS[hf_task.modality]
        if AUTO_CLASSES[hf_task] == "AutoModel":
            main_inputs = main_inputs[:1] if hf_task.modality == "image" else main_inputs[:2]
        for model_type, names in mapping._model_mapping.items():
            name = names[0] if isinstance(names, (tuple, list)) else names
            if _main_input(mapping, model_type, name) in main_inputs:
                classes.append(ModelClass(hf_task, AUTO_CLASSES[hf_task], model_type, name))
    return classes


def list_digest(tasks: Iterable[HfTask] = _TASKS) -> str:
    """Return a digest of everything that the list of classes follows from, which is cheap to compute.

    Args:
        tasks: Tasks whose classes are listed.
    """
    import transformers

    names = {
        task.value: sorted(getattr(transformers, AUTO_CLASSES[task])._model_mapping._model_mapping.items())
        for task in tasks
    }
    return json_digest(names)[:16]


def _main_input(mapping: Any, model_type: str, name: str) -> str | None:
    """Return the name of a class's main input; None if this installation cannot import the class."""
    try:
        return getattr(mapping._load_attr_from_module(model_type, name), "main_input_name", None)
    except (ImportError, ValueError, AttributeError):
        return None
