"""Call a transformers pipeline on a list, with batches of similar length and the answers of one item at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

from compileflow.contracts import Arrays
from compileflow.errors import InputError
from compileflow.serving.model import CompiledModel
from compileflow.serving.padding import OPTIONAL_INPUTS, complete_inputs
from compileflow.serving.rows import PreparedItem, checked_batch_size, run_rows
from compileflow.source_model.lengths import call_sizes


def call_list(pipeline: Any, inputs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
    """Call a pipeline on a list; the answers are those of one item at a time, in order.

    Args:
        pipeline: Pipeline of transformers around a CompiledModel. Pipelines of compileflow batch lists themselves.
        inputs: Items as the pipeline takes them.
        *args: Further arguments of the pipeline's call.
        **kwargs: Settings of the pipeline's call. batch_size is the most rows per call of the component; without
            it, here or in the pipeline's settings, it is 8.

    Raises:
        InputError: batch_size is not a positive integer, or an item does not fit the component.
    """
    if not hasattr(pipeline, "get_iterator"):
        return pipeline(list(inputs), *args, **kwargs)
    requested_size = kwargs.get("batch_size")
    batch_size = checked_batch_size(pipeline._batch_size if requested_size is None else requested_size)
    if any(tensor.axes[0] != "batch" for tensor in pipeline.model.graph.record.inputs):
        # An item has rows of its own, such as the labels of an image, and fills a call.
        return pipeline(list(inputs), *args, **(kwargs | {"batch_size": 1}))
    # `__call__` resolves the settings of its task and then takes the answers from `get_iterator`.
    batching = copy(pipeline)
    batching.get_iterator = partial(_answers, pipeline, batch_size)
    return batching(list(inputs), *args, **kwargs)


def _answers(
    pipeline: Any,
    batch_size: int | None,
    inputs: Sequence[Any],
    _num_workers: int,
    _loader_batch_size: int,
    preprocess_settings: dict[str, Any],
    forward_settings: dict[str, Any],
    postprocess_settings: dict[str, Any],
) -> Iterator[Any]:
    """Replace the pipeline's `get_iterator`: the same arguments, the same answers in the same order."""
    from transformers.pipelines.base import ChunkPipeline

    model = pipeline.model
    in_chunks = isinstance(pipeline, ChunkPipeline)
    # A copy for each call, because its model changes with every row, and threads share the pipeline.
    answering = copy(pipeline)

    def items() -> Iterator[PreparedItem[list[Any]]]:
        for item in inputs:
            chunks = pipeline.preprocess(item, **preprocess_settings)
            model_inputs = list(chunks) if in_chunks else [chunks]
            yield PreparedItem([_row(model, chunk) for chunk in model_inputs], model_inputs)

    def answer(model_inputs: list[Any], row_outputs: list[Arrays]) -> Any:
        outputs = []
        for chunk, arrays in zip(model_inputs, row_outputs, strict=True):
            answering.model = _AnsweredModel(model, _tensors(model, chunk), arrays)
            outputs.append(answering.forward(chunk, **forward_settings))
        if not in_chunks:
            return answering.postprocess(outputs[0], **postprocess_settings)
        for output in outputs:
            output.pop("is_last", None)
        return answering.postprocess(outputs, **postprocess_settings)

    return run_rows(model, items(), answer, batch_size=batch_size)


def _tensors(model: CompiledModel, model_inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Select what `_forward` passes to the model; the rest is for `postprocess`."""
    names = {*OPTIONAL_INPUTS, *(tensor.name for tensor in model.graph.record.inputs)}
    return {name: value for name, value in model_inputs.items() if name in names and value is not None}


def _row(model: CompiledModel, model_inputs: Mapping[str, Any]) -> Arrays:
    record = model.graph.record
    row = complete_inputs(record, _tensors(model, model_inputs))
    main = record.inputs[0]
    count, _ = call_sizes(main, row[main.name])
    if count != 1:
        raise InputError(
            f"Expected one row per item of a list, got {count}.", hint="Make each row an item of the list."
        )
    return row


@dataclass(frozen=True, eq=False)
class _AnsweredModel:
    """The model during one `_forward`: returns the outputs that were computed for a row in a batch.

    `_forward` of all compiled tasks passes the tensors that `preprocess` returned. One that passes others gets an
    answer of the model itself.

    Attributes:
        model: Compiled model; all its attributes are available here.
        tensors: Inputs that the outputs were computed from.
        outputs: Outputs of the component for these inputs.
    """

    model: CompiledModel
    tensors: Mapping[str, Any]
    outputs: Arrays

    def __call__(self, **inputs: Any) -> Any:
        arguments = {name: value for name, value in inputs.items() if value is not None}
        if arguments.keys() == self.tensors.keys() and all(
            arguments[name] is self.tensors[name] for name in arguments
        ):
            return self.model.as_output(self.outputs)
        return self.model(**inputs)

    def __getattr__(self, name: str) -> Any:
        if name == "model":
            raise AttributeError(name)
        return getattr(self.model, name)
