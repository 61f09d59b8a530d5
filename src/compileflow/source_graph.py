"""The source model as a PyTorch graph: loaded for its task, with its inputs, its outputs and their axes.

Targets compile from it and validation takes it as the reference. torch and transformers are imported inside
the functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compileflow.contracts import Arrays, ComponentPlan
from compileflow.errors import SourceError, SpecError
from compileflow.manifest import Axis, TensorRecord
from compileflow.spec import HfTask, Precision

if TYPE_CHECKING:
    import torch

AUTO_CLASSES: Mapping[HfTask, str] = {
    HfTask.FEATURE_EXTRACTION: "AutoModel",
    HfTask.TEXT_CLASSIFICATION: "AutoModelForSequenceClassification",
    HfTask.TOKEN_CLASSIFICATION: "AutoModelForTokenClassification",
    HfTask.FILL_MASK: "AutoModelForMaskedLM",
    HfTask.QUESTION_ANSWERING: "AutoModelForQuestionAnswering",
}
# Endings of class names in config.json's "architectures", for reading the task off a model.
HEADS: Mapping[str, HfTask] = {
    "ForSequenceClassification": HfTask.TEXT_CLASSIFICATION,
    "ForTokenClassification": HfTask.TOKEN_CLASSIFICATION,
    "ForMaskedLM": HfTask.FILL_MASK,
    "ForQuestionAnswering": HfTask.QUESTION_ANSWERING,
    "Model": HfTask.FEATURE_EXTRACTION,
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


@dataclass(frozen=True)
class SourceGraph:
    """A source model in evaluation mode with the interface that a compiled graph must keep."""

    model: Any
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    output_class: str
    pad_token_id: int
    vocab_size: int

    def run(self, inputs: Mapping[str, Any]) -> Arrays:
        """Run the source model: named int64 arrays (batch, sequence) to named float arrays."""
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
    inputs = _input_records(model, config)
    outputs, output_class = _output_records(model, inputs, config, without_pooler=bool(missing))
    return SourceGraph(
        model=model,
        inputs=inputs,
        outputs=outputs,
        output_class=output_class,
        pad_token_id=config.pad_token_id if config.pad_token_id is not None else 0,
        vocab_size=config.vocab_size,
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
        has_code = auto_class in getattr(config, "auto_map", {})
        if has_code or type(config) in getattr(transformers, auto_class)._model_mapping:
            found.append(task)
    return tuple(found)


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
    """Make inputs that look real: varied tokens, ragged masks, both token types. Always the same."""
    random = np.random.default_rng(20)
    ids = random.integers(0, vocab_size, (batch_size, sequence_length), dtype=np.int64)
    mask = np.ones_like(ids)
    for row in range(batch_size):
        # The last row is the longest, so that one row at least is full.
        keep = max(1, sequence_length * (row + 1) // batch_size) if batch_size > 1 else sequence_length
        mask[row, keep:] = 0
        ids[row, keep:] = pad_token_id
    values = {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": (np.arange(sequence_length) >= sequence_length // 2).astype(np.int64) * mask,
    }
    return {record.name: values[record.name] for record in inputs}


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
    import inspect

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


def _output_records(
    model: Any, inputs: Sequence[TensorRecord], config: Any, *, without_pooler: bool
) -> tuple[tuple[TensorRecord, ...], str]:
    import torch

    shapes: list[dict[str, tuple[int, ...]]] = []
    dtypes: dict[str, str] = {}
    probes = ((2, 7), (3, 11))
    for batch_size, length in probes:
        example = example_inputs(inputs, batch_size, length, config.vocab_size, config.pad_token_id or 0)
        with torch.inference_mode():
            answer = model(**{name: torch.as_tensor(value) for name, value in example.items()})
        tensors = {name: value for name, value in answer.items() if isinstance(value, torch.Tensor)}
        if without_pooler:
            tensors.pop("pooler_output", None)
        shapes.append({name: tuple(value.shape) for name, value in tensors.items()})
        dtypes = {name: str(value.dtype).removeprefix("torch.") for name, value in tensors.items()}
    records = []
    for name, first in shapes[0].items():
        second = shapes[1][name]
        axes: list[Axis] = []
        for a, b in zip(first, second, strict=True):
            axes.append("batch" if (a, b) == (2, 3) else "sequence" if (a, b) == (7, 11) else a)
        records.append(TensorRecord(name=name, dtype=dtypes[name], axes=tuple(axes)))
    kind = type(answer)
    return tuple(records), f"{kind.__module__}:{kind.__qualname__}"
