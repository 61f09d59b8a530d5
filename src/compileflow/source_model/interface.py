"""SourceModel: the loaded model with its inputs, its outputs and their axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compileflow.contracts import Arrays, TensorRecord
from compileflow.source_model.lengths import Convolutions
from compileflow.spec import Precision

if TYPE_CHECKING:
    import torch

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
class SourceModel:
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


def free_axes(inputs: Sequence[TensorRecord], batch: Any, sequence: Any) -> dict[str, dict[int, Any]]:
    """Return torch.export's dynamic_shapes: for each input, its axes that are free, and what each is."""
    dims = {"batch": batch, "sequence": sequence}
    return {
        record.name: {n: dims[axis] for n, axis in enumerate(record.axes) if isinstance(axis, str)}
        for record in inputs
    }


def as_tuple_module(graph: SourceModel, precision: Precision = Precision.FP32) -> torch.nn.Module:
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
