"""run_rows without a model: which rows share a call, and how a batch is stacked and split."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import accumulate, combinations, pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compileflow.contracts import Arrays, ComponentRecord, TensorRecord
from compileflow.serving.padding import split_row, stack_rows
from compileflow.serving.rows import PreparedItem, may_pad, plan_batches, run_rows
from compileflow.spec import ShapeBucket

PAD = 9


def record(*names: str, buckets: tuple[tuple[int, int], ...] = ()) -> ComponentRecord:
    """A graph of these inputs that takes any shape, or these buckets of (rows, length)."""
    return ComponentRecord(
        folder="components/default",
        inputs=tuple(TensorRecord(name=name, dtype="int64", axes=("batch", "sequence")) for name in names),
        outputs=(TensorRecord(name="hidden", dtype="float32", axes=("batch", "sequence", 2)),),
        output_class="transformers:BaseModelOutput",
        max_sequence_length=max((length for _, length in buckets), default=64),
        dynamic_axes=not buckets,
        shape_buckets=tuple(ShapeBucket(batch_size=rows, sequence_length=length) for rows, length in buckets),
        pad_token_id=PAD,
    )


def rows_of(graph: ComponentRecord, *lengths: int) -> list[Arrays]:
    """Rows of ones, one for each length."""
    return [{tensor.name: np.ones((1, length), dtype=np.int64) for tensor in graph.inputs} for length in lengths]


MASKED = record("input_ids", "attention_mask")


def test_rows_are_sorted_by_length_and_every_row_is_in_one_batch() -> None:
    rows = rows_of(MASKED, 3, 9, 4, 9, 1)

    assert plan_batches(MASKED, rows, batch_size=2, pad=True) == [[1, 3], [2, 0], [4]]
    assert plan_batches(MASKED, rows, batch_size=None, pad=True) == [[1, 3, 2, 0, 4]]
    assert plan_batches(MASKED, [], batch_size=2, pad=True) == []


def test_rows_that_must_not_be_padded_share_a_call_only_where_they_are_as_long() -> None:
    rows = rows_of(MASKED, 3, 9, 3, 9, 1, 3)

    assert plan_batches(MASKED, rows, batch_size=2, pad=False) == [[1, 3], [0, 2], [5], [4]]


def test_calls_of_texts_hold_the_token_budget_with_little_padding(caplog: pytest.LogCaptureFixture) -> None:
    # Log-normal lengths with a median of 20 tokens, which resemble those of sentences.
    lengths = np.clip(np.exp(np.random.default_rng(16).normal(np.log(20), 0.6, 1000)), 4, 256).astype(int)
    rows = rows_of(MASKED, *lengths)

    with caplog.at_level(logging.DEBUG, logger="compileflow.serving.rows"):
        batches = plan_batches(MASKED, rows, batch_size=None, pad=True)

    sizes = [len(batch) * max(lengths[batch]) for batch in batches]
    assert sorted(index for batch in batches for index in batch) == list(range(1000))
    assert max(sizes) <= 1024
    assert len(batches) < 50
    padding = 1 - sum(lengths) / sum(sizes)
    assert padding <= 0.03
    assert f"1000 rows in {len(batches)} calls, {100 * padding:.1f} % padding" in caplog.text
    assert max(map(len, plan_batches(MASKED, rows, batch_size=7, pad=True))) == 7


@given(st.lists(st.integers(1, 64), min_size=2, max_size=9))
def test_no_other_division_into_calls_computes_fewer_tokens(lengths: list[int]) -> None:
    ordered = sorted(lengths, reverse=True)

    def cost(ends: Sequence[int]) -> int:
        # Each call costs as much as 24 tokens.
        return sum((end - start) * ordered[start] + 24 for start, end in pairwise((0, *ends)))

    count = len(lengths)
    divisions = [(*inner, count) for size in range(count) for inner in combinations(range(1, count), size)]
    batches = plan_batches(MASKED, rows_of(MASKED, *lengths), batch_size=None, pad=True)

    assert cost(list(accumulate(map(len, batches)))) == min(map(cost, divisions))


@pytest.mark.parametrize(
    ("inputs", "vocabulary", "most"),
    [
        # 1,024 tokens; then 134 of them, whose logits over 250,000 tokens fill 128 MiB.
        ({"input_ids": ("int64", "batch", "sequence")}, 2, 102),
        ({"input_ids": ("int64", "batch", "sequence")}, 250_000, 13),
        # Images and recordings are not counted in tokens.
        ({"pixel_values": ("float32", "batch", 3, 4, 4)}, 2, 8),
        ({"input_values": ("float32", "batch", "sequence")}, 2, 8),
        (
            {"input_ids": ("int64", "batch", "sequence"), "pixel_values": ("float32", "batch", 3, 4, 4)},
            2,
            8,
        ),
    ],
)
def test_rows_per_call_follow_from_what_a_call_computes(
    inputs: dict[str, tuple[Any, ...]], vocabulary: int, most: int
) -> None:
    graph = ComponentRecord(
        folder="components/default",
        inputs=tuple(TensorRecord(name=name, dtype=dtype, axes=axes) for name, (dtype, *axes) in inputs.items()),
        outputs=(TensorRecord(name="logits", dtype="float32", axes=("batch", "sequence", vocabulary)),),
        output_class="transformers:MaskedLMOutput",
        max_sequence_length=64,
        dynamic_axes=True,
    )
    sizes = {"batch": 1, "sequence": 10}
    row = {
        tensor.name: np.ones([sizes.get(axis, axis) for axis in tensor.axes], tensor.dtype)
        for tensor in graph.inputs
    }

    assert max(map(len, plan_batches(graph, [row] * 200, batch_size=None, pad=True))) == most


def test_rows_of_a_static_graph_fill_the_bucket_that_they_are_padded_to() -> None:
    static = record("input_ids", "attention_mask", buckets=((1, 8), (4, 8), (2, 16)))
    rows = rows_of(static, 8, 3, 9, 5, 16, 2, 1)

    assert plan_batches(static, rows, batch_size=None, pad=True) == [[4, 2], [0, 3, 1, 5], [6]]
    assert plan_batches(static, rows, batch_size=3, pad=True) == [[4, 2], [0], [3], [1], [5], [6]]
    # Two rows are computed whether one or two are asked for.
    assert plan_batches(static, rows, batch_size=1, pad=True)[0] == [4, 2]


def test_shorter_rows_are_padded_on_the_right_and_cut_back() -> None:
    graph = record("input_ids", "attention_mask", "token_type_ids")
    rows = rows_of(graph, 2, 3)

    stacked = stack_rows(graph, rows)

    assert stacked["input_ids"].tolist() == [[1, 1, PAD], [1, 1, 1]]
    assert stacked["attention_mask"].tolist() == stacked["token_type_ids"].tolist() == [[1, 1, 0], [1, 1, 1]]
    answer = {"hidden": np.arange(12, dtype=np.float32).reshape(2, 3, 2)}
    assert split_row(graph, answer, 0, rows[0])["hidden"].tolist() == [[[0, 1], [2, 3]]]
    assert split_row(graph, answer, 1, rows[1])["hidden"].tolist() == [[[6, 7], [8, 9], [10, 11]]]


@pytest.mark.parametrize(
    ("names", "config", "padded"),
    [
        (("input_ids", "attention_mask"), {"model_type": "bert"}, True),
        (("input_ids",), {"model_type": "fnet"}, False),
        (("input_values", "attention_mask"), {"model_type": "wav2vec2"}, False),
        (("pixel_values",), {"model_type": "vit"}, False),
        (("input_ids", "attention_mask"), {"model_type": "deberta-v2"}, True),
        (("input_ids", "attention_mask"), {"model_type": "deberta-v2", "conv_kernel_size": 3}, False),
        (("input_ids", "attention_mask"), {"model_type": "funnel"}, False),
    ],
)
def test_only_tokens_behind_a_mask_are_padded(
    names: tuple[str, ...], config: dict[str, object], padded: bool
) -> None:
    assert may_pad(record(*names), SimpleNamespace(**config)) is padded


class Doubling:
    """A component that returns its input ids twice as large, and counts its calls."""

    def __init__(self) -> None:
        self.record = MASKED
        self.calls = 0

    def run(self, inputs: Arrays) -> Arrays:
        self.calls += 1
        return {"hidden": np.stack([inputs["input_ids"]] * 2, axis=2) * 2}


def items_of(*lengths: int | None) -> Iterator[PreparedItem[int]]:
    """One item for each length, of one row with its number as tokens; None fails."""
    for number, length in enumerate(lengths):
        if length is None:
            raise ValueError(f"item {number}")
        ids = np.full((1, length), number)
        yield PreparedItem([{"input_ids": ids, "attention_mask": np.ones_like(ids)}], number)


def total(number: int, row_outputs: list[Arrays]) -> tuple[int, int]:
    if number == 9:
        raise ValueError("item 9")
    return number, int(row_outputs[0]["hidden"].sum())


def test_answers_come_in_the_order_of_the_items_from_batches_of_similar_length() -> None:
    component = Doubling()
    model = SimpleNamespace(graph=component, config=SimpleNamespace(model_type="bert"))

    answers = list(run_rows(model, items_of(3, 9, 1, 7), total, batch_size=2))

    # Two columns of twice the number for each token.
    assert answers == [(0, 0), (1, 4 * 9), (2, 4 * 2), (3, 4 * 3 * 7)]
    assert component.calls == 2


@pytest.mark.parametrize(("lengths", "count"), [((1, 2, None, 3), 2), ((1,) * 9 + (5, 1), 9)])
def test_error_of_an_item_comes_after_the_answers_of_the_items_before_it(
    lengths: tuple[int | None, ...], count: int
) -> None:
    model = SimpleNamespace(graph=Doubling(), config=SimpleNamespace(model_type="bert"))
    answers = run_rows(model, items_of(*lengths), total)

    assert [next(answers)[0] for _ in range(count)] == list(range(count))
    with pytest.raises(ValueError, match=f"item {count}"):
        next(answers)
