"""The source model as a PyTorch graph: loaded for its task, with its inputs, its outputs and their axes.

Targets compile from it and validation takes it as the reference. torch and transformers are imported inside
the functions. Over 300 lines, because loading a model, probing it and making its inputs share what a graph is.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compileflow.contracts import Axis, TensorRecord
from compileflow.errors import SourceError, SpecError
from compileflow.source_model.examples import example_inputs
from compileflow.source_model.interface import SourceModel
from compileflow.source_model.lengths import frame_convolutions
from compileflow.source_model.processor import load_processor, signal_lengths, signal_records
from compileflow.source_model.tasks import AUTO_CLASSES, tasks_of
from compileflow.spec import HfTask

if TYPE_CHECKING:
    pass

_TEXT_PROBES = (7, 11)


def load_source_model(
    folder: Path,
    hf_task: HfTask,
    *,
    attention: str = "sdpa",
    trust_remote_code: bool = False,
) -> SourceModel:
    """Load a source model for its task, in fp32, and find out its interface by running it twice.

    Raises:
        SpecError: the architecture has no head for the task, or remote code is not trusted.
        SourceError: the weights lack a part of the head, or cannot be read.
    """
    config = load_config(folder, trust_remote_code=trust_remote_code)
    model, missing = _load_model(folder, config, hf_task, attention, trust_remote_code)
    if hf_task.modality == "text":
        inputs = _input_records(model, config)
        lengths = _TEXT_PROBES
    else:
        processor = load_processor(folder, hf_task.modality, trust_remote_code=trust_remote_code)
        inputs = signal_records(processor, inspect.signature(model.forward).parameters, type(model).__name__)
        lengths = signal_lengths(processor, inputs)
    outputs, output_class, frames = _output_records(model, inputs, config, lengths, without_pooler=bool(missing))
    return SourceModel(
        model=model,
        inputs=inputs,
        outputs=outputs,
        output_class=output_class,
        pad_token_id=_pad_token_id(config),
        vocab_size=_vocab_size(config),
        frame_convolutions=frame_convolutions(config, frames) if "sequence" in inputs[0].axes else (),
    )


def load_config(folder: Path, *, trust_remote_code: bool) -> Any:
    """Load a source model's configuration."""
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
            f"config.json of the source model cannot be used: {text}",
            hint="Use a model that this version of transformers knows.",
        ) from error


def _load_model(
    folder: Path, config: Any, hf_task: HfTask, attention: str, trust_remote_code: bool
) -> tuple[Any, set[str]]:
    import torch
    import transformers
    from safetensors import SafetensorError

    supported = tasks_of(config)
    if hf_task not in supported:
        raise SpecError(
            f"{config.model_type} has no head for {hf_task.value}.",
            hint=f"Choose one of: {', '.join(supported) or 'none that compileflow knows'}.",
        )
    try:
        model, report = getattr(transformers, AUTO_CLASSES[hf_task]).from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            attn_implementation=attention,
            local_files_only=True,
            output_loading_info=True,
            # Otherwise the error names no tensor; they are refused below.
            ignore_mismatched_sizes=True,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise SourceError(
            f"The source model's weights cannot be loaded: {error}",
            hint="Check that the folder holds one complete model saved by save_pretrained.",
        ) from error
    if report["mismatched_keys"]:
        name, found, wanted = min(report["mismatched_keys"])
        raise SourceError(
            f"The weights hold {name} of shape {tuple(found)}; config.json asks for {tuple(wanted)} "
            f"({len(report['mismatched_keys'])} such tensors).",
            hint="Use the config.json that was saved with these weights.",
        )
    missing = set(report["missing_keys"])
    pooler = {key for key in missing if hf_task is HfTask.FEATURE_EXTRACTION and "pooler." in key}
    lost = sorted(missing - pooler)
    if lost:
        raise SpecError(
            f"The weights hold no {lost[0]} ({len(lost)} tensors in all): the model was saved as "
            f"{', '.join(config.architectures or ['an unknown class'])}, not for {hf_task.value}.",
            hint="Choose the task that it was trained for, or give a fine-tuned model.",
        )
    return model.eval(), pooler


def _input_records(model: Any, config: Any) -> tuple[TensorRecord, ...]:
    names = list(inspect.signature(model.forward).parameters)
    wanted = ["input_ids", "attention_mask"]
    if "token_type_ids" in names and getattr(config, "type_vocab_size", 0) > 1:
        wanted.append("token_type_ids")
    if "input_ids" not in names:
        raise SourceError(
            f"{type(model).__name__}.forward names no input_ids; it has {', '.join(names)}.",
            hint="Let forward name its inputs: a graph has named inputs.",
        )
    return tuple(
        TensorRecord(name=name, dtype="int64", axes=("batch", "sequence")) for name in wanted if name in names
    )


def _pad_token_id(config: Any) -> int:
    return getattr(config, "pad_token_id", None) or 0


def _vocab_size(config: Any) -> int:
    return int(getattr(config, "vocab_size", None) or 0)


def _output_records(
    model: Any, inputs: Sequence[TensorRecord], config: Any, lengths: tuple[int, int], *, without_pooler: bool
) -> tuple[tuple[TensorRecord, ...], str, list[tuple[int, int]]]:
    """Return the outputs, their class, and, where one has frames, the frames of each probed length."""
    import torch

    shapes: list[dict[str, tuple[int, ...]]] = []
    dtypes: dict[str, str] = {}
    for batch_size, length in zip((2, 3), lengths, strict=True):
        example = example_inputs(inputs, batch_size, length, _vocab_size(config), _pad_token_id(config))
        with torch.inference_mode():
            answer = model(**{name: torch.as_tensor(value) for name, value in example.items()})
        tensors = {name: value for name, value in answer.items() if isinstance(value, torch.Tensor)}
        if without_pooler:
            tensors.pop("pooler_output", None)
        shapes.append({name: tuple(value.shape) for name, value in tensors.items()})
        dtypes = {name: str(value.dtype).removeprefix("torch.") for name, value in tensors.items()}
    records = []
    frames: list[tuple[int, int]] = []
    for name, first in shapes[0].items():
        second = shapes[1][name]
        axes: list[Axis] = []
        for a, b in zip(first, second, strict=True):
            if a == b:
                axes.append(a)
            elif (a, b) in ((2, 3), lengths):
                axes.append("batch" if (a, b) == (2, 3) else "sequence")
            else:
                axes.append("frames")
                frames = list(zip(lengths, (a, b), strict=True))
        records.append(TensorRecord(name=name, dtype=dtypes[name], axes=tuple(axes)))
    kind = type(answer)
    return tuple(records), f"{kind.__module__}:{kind.__qualname__}", frames
