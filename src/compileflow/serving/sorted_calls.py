"""Run a list through a pipeline in batches of like length, and give the answers in the list's own order.

The pipeline's own `preprocess`, `_forward` and `postprocess` see one item at a time, as without batches. Only the
graph behind the model is stood in for: it takes down what each item asks, and later hands out the answer that was
computed in a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

from compileflow.contracts import Arrays
from compileflow.errors import InputError
from compileflow.serving.batches import checked_batch_size, may_pad, plan_batches, split_row, stack_rows
from compileflow.serving.component import LoadedComponent
from compileflow.serving.padding import complete_inputs

# How much of a list is looked at and sorted at a time, whichever comes first.
_WINDOW_ITEMS = 1024
_WINDOW_BYTES = 64 * 2**20


def call_sorted(pipeline: Any, inputs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
    """Call a pipeline on a list; the answers are those of one item at a time, in order.

    Args:
        pipeline: transformers' own, around a CompiledModel; any other sorts for itself, and is called as it is.
        inputs: Whatever the pipeline takes, one entry an item.
        *args: As the pipeline's call takes them.
        **kwargs: Likewise; batch_size is the most rows a call of the graph, without one here or in the pipeline's
            settings 8.

    Raises:
        InputError: batch_size is no positive integer, or an item does not fit the graph.
    """
    if not hasattr(pipeline, "get_iterator"):
        return pipeline(list(inputs), *args, **kwargs)
    asked = kwargs.get("batch_size")
    batch_size = checked_batch_size(pipeline._batch_size if asked is None else asked)
    # A copy a call: threads share the model and the tokenizer, never a stand-in.
    own = copy(pipeline)
    own.model = copy(pipeline.model)
    own.model.graph = _Relay(pipeline.model.graph)
    own.get_iterator = partial(_answers, own, batch_size)
    try:
        return own(list(inputs), *args, **kwargs)
    finally:
        # It refers to the copy, and would keep it until the next garbage collection.
        del own.get_iterator


class _Asked(Exception):  # noqa: N818 - no error
    """Carries a call's inputs out of the pipeline's forward."""

    def __init__(self, inputs: Any):
        super().__init__()
        self.inputs = inputs


class _Relay:
    """Stands in for a loaded graph: raises what is asked of it, or hands out the answer that it was given."""

    def __init__(self, graph: LoadedComponent):
        self.graph = graph
        self.collecting = False
        self.answer: Arrays | None = None

    def run(self, inputs: Any) -> Arrays:
        if self.collecting:
            raise _Asked(inputs)
        answer, self.answer = self.answer, None
        return self.graph.run(inputs) if answer is None else answer

    def __getattr__(self, name: str) -> Any:
        if name == "graph":
            raise AttributeError(name)
        return getattr(self.graph, name)


@dataclass
class _Item:
    """One entry of the list: what `preprocess` made of it, and what has become of that."""

    model_inputs: list[Any]
    rows: list[Arrays]
    outputs: list[Any]
    missing: int


@dataclass(frozen=True)
class _Call:
    """One call of a pipeline, its settings resolved."""

    pipeline: Any
    batch_size: int | None
    preprocess: dict[str, Any]
    forward: dict[str, Any]
    postprocess: dict[str, Any]
    in_chunks: bool

    def prepared(self, entry: Any) -> _Item:
        made = self.pipeline.preprocess(entry, **self.preprocess)
        model_inputs = list(made) if self.in_chunks else [made]
        rows = [self._asked(each) for each in model_inputs]
        return _Item(model_inputs, rows, [None] * len(rows), len(rows))

    def _asked(self, model_inputs: Any) -> Arrays:
        relay = self.pipeline.model.graph
        relay.collecting = True
        try:
            self.pipeline.forward(model_inputs, **self.forward)
        except _Asked as asked:
            return complete_inputs(relay.record, asked.inputs)
        finally:
            relay.collecting = False
        raise InputError(
            f"{type(self.pipeline).__name__} answered without its model.", hint="Call it with one input at a time."
        )

    def computed(self, items: Sequence[_Item]) -> list[Any]:
        """Run all items' rows in batches and return the items' results.

        Raises:
            Exception: what `_forward` or `postprocess` raised, for the first of the items where one did.
        """
        relay = self.pipeline.model.graph
        record, graph = relay.record, relay.graph
        places = [(number, place) for number, item in enumerate(items) for place in range(len(item.rows))]
        rows = [items[number].rows[place] for number, place in places]
        pad = may_pad(record, self.pipeline.model.config)
        results: list[Any] = [None] * len(items)
        failed: dict[int, Exception] = {}
        for batch in plan_batches(record, rows, batch_size=self.batch_size, pad=pad):
            answer = graph.run(stack_rows(record, [rows[index] for index in batch]))
            for position, index in enumerate(batch):
                number, place = places[index]
                item = items[number]
                try:
                    relay.answer = split_row(record, answer, position, rows[index])
                    item.outputs[place] = self.pipeline.forward(item.model_inputs[place], **self.forward)
                    item.missing -= 1
                    # Finished as soon as it can be: logits of a vocabulary are large.
                    if not item.missing:
                        results[number] = self._result(item)
                except Exception as error:  # noqa: BLE001 - raised below
                    failed.setdefault(number, error)
        if failed:
            raise failed[min(failed)]
        return results

    def _result(self, item: _Item) -> Any:
        outputs, item.outputs, item.model_inputs = item.outputs, [], []
        if not self.in_chunks:
            return self.pipeline.postprocess(outputs[0], **self.postprocess)
        for output in outputs:
            output.pop("is_last", None)
        return self.pipeline.postprocess(outputs, **self.postprocess)


def _answers(
    pipeline: Any,
    batch_size: int | None,
    inputs: Sequence[Any],
    _num_workers: int,
    _loader_batch_size: int,
    preprocess: dict[str, Any],
    forward: dict[str, Any],
    postprocess: dict[str, Any],
) -> Iterator[Any]:
    """Stand in for the pipeline's `get_iterator`: the same arguments, the same results in the same order."""
    from transformers.pipelines.base import ChunkPipeline

    in_chunks = isinstance(pipeline, ChunkPipeline)
    call = _Call(pipeline, batch_size, preprocess, forward, postprocess, in_chunks)
    start = 0
    while start < len(inputs):
        items, error = _window(call, inputs, start)
        yield from call.computed(items)
        if error is not None:
            raise error
        start += len(items)


def _window(call: _Call, inputs: Sequence[Any], start: int) -> tuple[list[_Item], Exception | None]:
    """Prepare items until there are enough, or one fails: those before it come first, and may fail, too."""
    items: list[_Item] = []
    held = 0
    for position in range(start, min(start + _WINDOW_ITEMS, len(inputs))):
        try:
            item = call.prepared(inputs[position])
        except Exception as error:  # noqa: BLE001 - raised by the caller
            return items, error
        items.append(item)
        held += sum(value.nbytes for row in item.rows for value in row.values())
        if held >= _WINDOW_BYTES:
            break
    return items, None
