"""The source model as a PyTorch graph: loaded for its task, with its inputs, its outputs and their axes.

Targets compile from it and validation takes it as the reference. torch and transformers are imported inside
the functions. Over 300 lines, because loading a model, probing it and making its inputs share what a graph is.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compileflow.contracts import Arrays, ComponentPlan
from compileflow.errors import SourceError, SpecError
from compileflow.manifest import Axis, TensorRecord
from compileflow.signals import Convolutions, frame_convolutions, load_processor, signal_lengths, signal_records
from compileflow.spec import HfTask, Modality, Precision

if TYPE_CHECKING:
    import torch

AUTO_CLASSES: Mapping[HfTask, str] = {
    HfTask.FEATURE_EXTRACTION: "AutoModel",
    HfTask.SENTENCE_SIMILARITY: "AutoModel",
    HfTask.TEXT_CLASSIFICATION: "AutoModelForSequenceClassification",
    HfTask.ZERO_SHOT_CLASSIFICATION: "AutoModelForSequenceClassification",
    HfTask.TOKEN_CLASSIFICATION: "AutoModelForTokenClassification",
    HfTask.FILL_MASK: "AutoModelForMaskedLM",
    HfTask.QUESTION_ANSWERING: "AutoModelForQuestionAnswering",
    HfTask.IMAGE_CLASSIFICATION: "AutoModelForImageClassification",
    HfTask.AUDIO_CLASSIFICATION: "AutoModelForAudioClassification",
    HfTask.SPEECH_RECOGNITION: "AutoModelForCTC",
}
# Endings of class names in config.json's "architectures", for reading the task off a model.
HEADS: Mapping[str, HfTask] = {
    "ForSequenceClassification": HfTask.TEXT_CLASSIFICATION,
    "ForTokenClassification": HfTask.TOKEN_CLASSIFICATION,
    "ForMaskedLM": HfTask.FILL_MASK,
    "ForQuestionAnswering": HfTask.QUESTION_ANSWERING,
    "ForImageClassification": HfTask.IMAGE_CLASSIFICATION,
    "ForAudioClassification": HfTask.AUDIO_CLASSIFICATION,
    "ForCTC": HfTask.SPEECH_RECOGNITION,
    "Model": HfTask.FEATURE_EXTRACTION,
}
# Speech encoders call a classifier of whole recordings ForSequenceClassification, as text models do.
_SPEECH_ENCODERS = ("Data2VecAudio", "Hubert", "SEW", "UniSpeech", "Wav2Vec2", "WavLM")
# What a model's main input says about it.
_MODALITIES: Mapping[str, Modality] = {
    "input_ids": "text",
    "pixel_values": "image",
    "input_values": "audio",
    "input_features": "audio",
}
# Model types whose embeddings number positions with transformers' create_position_ids_from_input_ids.
_POSITIONS_AFTER_PADDING = (
    "camembert",
    "data2vec-text",
    "ibert",
    "longformer",
    "luke",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)


_TEXT_PROBES = (7, 11)


@dataclass(frozen=True)
class SourceGraph:
    """A source model in evaluation mode with the interface that a compiled graph must keep."""

    model: Any
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    output_class: str
    pad_token_id: int
    vocab_size: int
    frame_convolutions: Convolutions = ()

    def run(self, inputs: Mapping[str, Any]) -> Arrays:
        """Run the source model: named arrays, of the inputs' axes, to named float arrays."""
        import torch

        with torch.inference_mode():
            answer = self.model(**{name: torch.as_tensor(value) for name, value in inputs.items()})
        return {record.name: answer[record.name].numpy() for record in self.outputs}


def load_source_graph(
    folder: Path,
    hf_task: HfTask,
    *,
    attention: str = "sdpa",
    trust_remote_code: bool = False,
) -> SourceGraph:
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
    return SourceGraph(
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


def tasks_of(config: Any) -> tuple[HfTask, ...]:
    """Return the tasks that an architecture has a head for."""
    import transformers

    found = []
    for task, auto_class in AUTO_CLASSES.items():
        heads = getattr(transformers, auto_class)._model_mapping
        if auto_class in getattr(config, "auto_map", {}):
            found.append(task)
        elif type(config) in heads:
            # Speech encoders and vision models have an AutoModel, too; it takes no text.
            head = heads[type(config)]
            main_input = (head[0] if isinstance(head, tuple) else head).main_input_name
            if _MODALITIES.get(main_input) == task.modality:
                found.append(task)
    return tuple(found)


def task_of_architecture(name: str) -> HfTask | None:
    """Read the task off the name of a model class; None when its ending is unknown."""
    if name.startswith(_SPEECH_ENCODERS) and name.endswith("ForSequenceClassification"):
        return HfTask.AUDIO_CLASSIFICATION
    if name.endswith(("HeadModel", "HeadsModel")):
        # GPT2LMHeadModel generates; it has no hidden states to give.
        return None
    return next((task for ending, task in HEADS.items() if name.endswith(ending)), None)


def maximum_length(config: Any, tokenizer_maximum: int | None) -> int:
    """Return the longest input that a model has positions for, in tokens.

    RoBERTa-like models number positions from pad_token_id + 1, and lose that many.
    """
    positions = getattr(config, "max_position_embeddings", None) or 512
    if config.model_type in _POSITIONS_AFTER_PADDING:
        positions -= (config.pad_token_id or 0) + 1
    if tokenizer_maximum is not None and 0 < tokenizer_maximum < positions:
        return tokenizer_maximum
    return int(positions)


def example_inputs(
    inputs: Sequence[TensorRecord], batch_size: int, sequence_length: int, vocab_size: int, pad_token_id: int
) -> Arrays:
    """Make inputs that look real: varied tokens or noise, ragged masks, both token types. Always the same."""
    random = np.random.default_rng(20)
    mask = np.ones((batch_size, sequence_length), np.int64)
    for row in range(batch_size):
        # The last row is the longest, so that one row at least is full.
        keep = max(1, sequence_length * (row + 1) // batch_size) if batch_size > 1 else sequence_length
        mask[row, keep:] = 0
    values: Arrays = {}
    for record in inputs:
        if record.name == "input_ids":
            ids = random.integers(0, vocab_size, (batch_size, sequence_length), dtype=np.int64)
            values[record.name] = np.where(mask == 1, ids, pad_token_id)
        elif record.name == "attention_mask":
            values[record.name] = mask
        elif record.name == "token_type_ids":
            second = np.arange(sequence_length) >= sequence_length // 2
            values[record.name] = second.astype(np.int64) * mask
        else:
            values[record.name] = _noise(
                random, record, mask, masked=any(r.name == "attention_mask" for r in inputs)
            )
    return values


def free_axes(inputs: Sequence[TensorRecord], batch: Any, sequence: Any) -> dict[str, dict[int, Any]]:
    """Return torch.export's dynamic_shapes: for each input, its axes that are free, and what each is."""
    dims = {"batch": batch, "sequence": sequence}
    return {
        record.name: {n: dims[axis] for n, axis in enumerate(record.axes) if isinstance(axis, str)}
        for record in inputs
    }


def example_length(inputs: Sequence[TensorRecord], longest: int) -> int:
    """Return the length of the inputs that a graph with free axes is exported with."""
    if "sequence" not in inputs[0].axes:
        return 1
    # Of audio a second at most, of text a sentence.
    return min(16 if inputs[0].name == "input_ids" else 16_000, longest)


def calibration_tensors(graph: SourceGraph, plan: ComponentPlan) -> list[dict[str, torch.Tensor]]:
    """Return a plan's calibration batches as tensors: transformers' exporters drop arrays without a word."""
    import torch

    return [
        {record.name: torch.as_tensor(batch[record.name]) for record in graph.inputs} for batch in plan.calibration
    ]


def as_tuple_module(graph: SourceGraph, precision: Precision = Precision.FP32) -> torch.nn.Module:
    """Wrap the model: positional inputs in the graph's order, a tuple of outputs in the graph's order.

    At bf16 and fp16 matrix products are in that format, and what sums over many elements (layer normalisation,
    softmax, the residual stream) stays in fp32, as torch.autocast has it: of MiniLM's ten nearest neighbours
    99.4 % stay, against 98.9 % where every operator is in bf16. Outputs are float32.
    """
    import torch

    formats = {Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}
    lowered = formats.get(precision)

    input_names = [record.name for record in graph.inputs]
    output_names = [record.name for record in graph.outputs]

    class TupleModule(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = graph.model

        def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            named = dict(zip(input_names, tensors, strict=True))
            if lowered is None:
                answer = self.model(**named)
            else:
                with torch.autocast("cpu", lowered, cache_enabled=False):
                    answer = self.model(**named)
            return tuple(answer[name].float() for name in output_names)

    return TupleModule().eval()


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


def _noise(random: np.random.Generator, record: TensorRecord, mask: NDArray[Any], *, masked: bool) -> NDArray[Any]:
    rows, length = mask.shape
    sizes = {"batch": rows, "sequence": length}
    shape = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in record.axes)
    values = random.standard_normal(shape, dtype=np.float32)
    if masked and "sequence" in record.axes:
        values *= mask.reshape([sizes[a] if a in ("batch", "sequence") else 1 for a in record.axes])
    return values


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
