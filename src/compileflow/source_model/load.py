"""Load a source model from its folder: its configuration, and its weights with the head of a task.

Targets compile from the result, and validation uses it as the reference. torch and transformers are imported
inside the functions.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from compileflow.errors import SourceError, SpecError
from compileflow.source_model.interface import TEXT_PROBES, SourceModel, probe_model, text_inputs
from compileflow.source_model.processor import load_processor, signal_lengths, signal_records
from compileflow.source_model.tasks import AUTO_CLASSES, tasks_of
from compileflow.spec import HfTask


def load_source_model(
    folder: Path,
    hf_task: HfTask,
    *,
    attention: str = "sdpa",
    trust_remote_code: bool = False,
) -> SourceModel:
    """Load a source model in fp32 with the head of a task, and run it twice to learn its interface.

    Args:
        folder: Folder that save_pretrained wrote.
        hf_task: Task whose head the model must have.
        attention: Implementation of attention in transformers.
        trust_remote_code: Run Python files of the folder.

    Raises:
        SpecError: The architecture or the weights have no head for the task, or remote code is not trusted.
        SourceError: The configuration or the weights cannot be read.
    """
    config = load_config(folder, trust_remote_code=trust_remote_code)
    model, has_pooler = _load_model(folder, config, hf_task, attention, trust_remote_code)
    if hf_task.modality == "text":
        inputs = text_inputs(model, config)
        lengths = TEXT_PROBES
    else:
        processor = load_processor(folder, hf_task.modality, trust_remote_code=trust_remote_code)
        inputs = signal_records(processor, inspect.signature(model.forward).parameters, type(model).__name__)
        lengths = signal_lengths(processor, inputs)
    return probe_model(model, config, inputs, lengths, ignored_outputs=() if has_pooler else ("pooler_output",))


def load_config(folder: Path, *, trust_remote_code: bool) -> Any:
    """Load the configuration of a source model.

    Raises:
        SpecError: The model brings Python code that is not trusted.
        SourceError: transformers cannot use config.json.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        text = str(error)
        if "trust_remote_code" in text:
            raise SpecError(
                "The source model brings its own Python code, and trust_remote_code is off.",
                hint="Read that code; if you trust it, set trust_remote_code to true.",
            ) from error
        raise SourceError(
            f"transformers cannot use config.json of the source model: {text}",
            hint="Use a model that this version of transformers supports.",
        ) from error


def _load_model(
    folder: Path, config: Any, hf_task: HfTask, attention: str, trust_remote_code: bool
) -> tuple[Any, bool]:
    """Return the model, and whether the weights hold everything that its pooler needs."""
    import torch
    import transformers
    from safetensors import SafetensorError

    supported_tasks = tasks_of(config)
    if hf_task not in supported_tasks:
        raise SpecError(
            f"{config.model_type} has no head for {hf_task.value}.",
            hint=f"Choose one of: {', '.join(supported_tasks)}."
            if supported_tasks
            else "Choose another model: this one has no task that compileflow compiles.",
        )
    try:
        model, report = getattr(transformers, AUTO_CLASSES[hf_task]).from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            attn_implementation=attention,
            local_files_only=True,
            output_loading_info=True,
            # Without it, transformers' error names no tensor. Mismatched tensors are refused below.
            ignore_mismatched_sizes=True,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise SourceError(
            f"The source model's weights cannot be loaded: {error}",
            hint="Check that the folder holds one complete model saved by save_pretrained.",
        ) from error
    mismatched_keys = report["mismatched_keys"]
    if mismatched_keys:
        name, actual_shape, expected_shape = min(mismatched_keys)
        raise SourceError(
            f"Expected {name} of shape {tuple(expected_shape)} from config.json, got shape {tuple(actual_shape)} "
            f"from the weights; {len(mismatched_keys)} tensors differ.",
            hint="Use the config.json that was saved with these weights.",
        )
    missing_keys = set(report["missing_keys"])
    missing_pooler = {key for key in missing_keys if hf_task is HfTask.FEATURE_EXTRACTION and "pooler." in key}
    missing_head = sorted(missing_keys - missing_pooler)
    if missing_head:
        raise SpecError(
            f"The weights hold no {missing_head[0]} ({len(missing_head)} tensors are missing): the model was "
            f"saved as {', '.join(config.architectures or ['an unknown class'])}, not for {hf_task.value}.",
            hint="Choose the task that the model was trained for, or give a fine-tuned model.",
        )
    return model.eval(), not missing_pooler
