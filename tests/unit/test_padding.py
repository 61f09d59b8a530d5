"""Checks of inputs, and how batches are padded to shape buckets, split, and cut back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from compileflow.contracts import Arrays, Axis, ComponentRecord, TensorRecord
from compileflow.errors import InputError
from compileflow.serving.padding import complete_inputs, pad_to, plan_calls, run_fitted, token_row
from compileflow.spec import ShapeBucket

PAD = 9


def bucket(text: str) -> ShapeBucket:
    batch_size, _, sequence_length = text.partition("x")
    return ShapeBucket(batch_size=int(batch_size), sequence_length=int(sequence_length))


def record(*buckets: str, inputs: tuple[str, ...] = ("input_ids", "attention_mask")) -> ComponentRecord:
    """A component of these buckets, or with dynamic axes when there are none."""
    shapes = tuple(bucket(text) for text in buckets)
    return ComponentRecord(
        folder="components/default",
        inputs=tuple(TensorRecord(name=name, dtype="int64", axes=("batch", "sequence")) for name in inputs),
        outputs=(
            TensorRecord(name="tokens", dtype="float32", axes=("batch", "sequence", 2)),
            TensorRecord(name="pooled", dtype="float32", axes=("batch", 2)),
        ),
        output_class="transformers.modeling_outputs:BaseModelOutput",
        max_sequence_length=max((shape.sequence_length for shape in shapes), default=16),
        dynamic_axes=not shapes,
        shape_buckets=shapes,
        pad_token_id=PAD,
    )


class RecordingRunner:
    """Computes something that every unmasked token changes, and keeps what it was given."""

    def __init__(self) -> None:
        self.calls: list[Arrays] = []

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        self.calls.append(dict(inputs))
        masked = (inputs["input_ids"] * inputs["attention_mask"]).astype(np.float32)
        tokens = np.stack([masked, -masked], axis=2)
        return {"tokens": tokens, "pooled": tokens.sum(axis=1)}

    def close(self) -> None:
        pass


def given(rows: int, length: int) -> Arrays:
    ids = np.arange(1, rows * length + 1, dtype=np.int64).reshape(rows, length)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def called(runner: RecordingRunner) -> list[tuple[int, ...]]:
    return [call["input_ids"].shape for call in runner.calls]


@pytest.mark.parametrize(
    ("rows", "length", "calls"),
    [
        (1, 1, ["1x8"]),
        (1, 8, ["1x8"]),
        (1, 9, ["1x16"]),
        (1, 16, ["1x16"]),
        (1, 17, ["1x64"]),
        (3, 8, ["1x8", "1x8", "1x8"]),
        (2, 16, ["1x16", "1x16"]),
        (3, 16, ["4x16"]),
        (4, 10, ["4x16"]),
        (5, 16, ["4x16", "1x16"]),
        (7, 16, ["4x16", "4x16"]),
        (11, 16, ["4x16", "4x16", "4x16"]),
    ],
)
def test_shortest_length_that_fits_and_batches_with_little_padding(
    rows: int, length: int, calls: list[str]
) -> None:
    buckets = [bucket(text) for text in ("1x64", "4x16", "1x8", "1x16")]

    assert plan_calls(buckets, rows, length) == [bucket(text) for text in calls]


def test_a_lone_large_bucket_takes_a_small_batch() -> None:
    assert plan_calls([bucket("8x16")], 1, 4) == [bucket("8x16")]
    assert plan_calls([bucket("8x16")], 9, 4) == [bucket("8x16"), bucket("8x16")]


def test_padding_adds_masked_tokens_and_repeats_the_last_row() -> None:
    inputs = {
        "input_ids": np.array([[1, 2], [3, 4]]),
        "attention_mask": np.array([[1, 1], [1, 0]]),
        "token_type_ids": np.array([[0, 1], [1, 1]]),
    }

    padded = pad_to(inputs, bucket("4x3"), record("4x3", inputs=tuple(inputs)))

    np.testing.assert_array_equal(padded["input_ids"], [[1, 2, PAD], [3, 4, PAD], [3, 4, PAD], [3, 4, PAD]])
    np.testing.assert_array_equal(padded["attention_mask"], [[1, 1, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0]])
    np.testing.assert_array_equal(padded["token_type_ids"], [[0, 1, 0], [1, 1, 0], [1, 1, 0], [1, 1, 0]])


def test_padding_leaves_inputs_that_fill_the_bucket() -> None:
    inputs = given(2, 3)

    padded = pad_to(inputs, bucket("2x3"), record("2x3"))

    np.testing.assert_array_equal(padded["input_ids"], inputs["input_ids"])
    np.testing.assert_array_equal(padded["attention_mask"], inputs["attention_mask"])


@pytest.mark.parametrize(("rows", "length"), [(1, 3), (1, 8), (2, 5), (3, 12), (6, 16), (5, 7)])
def test_answers_of_padded_and_split_calls_equal_those_of_one_free_call(rows: int, length: int) -> None:
    inputs = given(rows, length)
    free = run_fitted(RecordingRunner(), record(), inputs)

    fitted = run_fitted(RecordingRunner(), record("1x8", "1x16", "4x16"), inputs)

    assert fitted["tokens"].shape == (rows, length, 2)
    assert fitted["pooled"].shape == (rows, 2)
    for name, value in free.items():
        np.testing.assert_array_equal(fitted[name], value)


def test_a_larger_batch_is_split_in_order() -> None:
    runner = RecordingRunner()
    inputs = given(6, 16)

    run_fitted(runner, record("1x16", "4x16"), inputs)

    assert called(runner) == [(4, 16), (1, 16), (1, 16)]
    sent = np.concatenate([call["input_ids"] for call in runner.calls])
    np.testing.assert_array_equal(sent, inputs["input_ids"])


def test_dynamic_axes_get_the_batch_as_it_is() -> None:
    runner = RecordingRunner()

    run_fitted(runner, record(), given(7, 5))

    assert called(runner) == [(7, 5)]


def test_missing_mask_counts_every_token_and_missing_token_types_are_zero() -> None:
    component = record("1x8", inputs=("input_ids", "attention_mask", "token_type_ids"))

    arrays = complete_inputs(component, {"input_ids": [[5, 6, 7]], "attention_mask": None})

    np.testing.assert_array_equal(arrays["attention_mask"], [[1, 1, 1]])
    np.testing.assert_array_equal(arrays["token_type_ids"], [[0, 0, 0]])


def test_inputs_become_contiguous_int64_in_the_graphs_order() -> None:
    ids = np.arange(6, dtype=np.int32).reshape(3, 2).T
    mask = np.ones((2, 3), dtype=bool)

    arrays = complete_inputs(record("4x8"), {"attention_mask": mask, "input_ids": ids})

    assert list(arrays) == ["input_ids", "attention_mask"]
    for array in arrays.values():
        assert array.dtype == np.int64
        assert array.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(arrays["input_ids"], [[0, 2, 4], [1, 3, 5]])
    np.testing.assert_array_equal(arrays["attention_mask"], np.ones((2, 3)))


def test_token_types_of_a_model_without_them_are_left_out() -> None:
    arrays = complete_inputs(record("1x8"), {"input_ids": [[1, 2]], "token_type_ids": [[0, 0]]})

    assert set(arrays) == {"input_ids", "attention_mask"}


def test_inputs_that_are_none_count_as_not_given() -> None:
    arrays = complete_inputs(record("1x8"), {"input_ids": [[1, 2]], "position_ids": None})

    assert set(arrays) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"input_ids": np.ones((1, 17), dtype=np.int64)}, r"17 tokens.*at most 16.*CompiledTokenizer"),
        ({"input_ids": np.ones(4, dtype=np.int64)}, r"shape \(batch, sequence\), got int64 of shape \(4,\)"),
        ({"input_ids": np.ones((1, 2, 3), dtype=np.int64)}, r"shape \(1, 2, 3\)"),
        ({"input_ids": np.ones((0, 4), dtype=np.int64)}, r"shape \(0, 4\)"),
        ({"input_ids": np.ones((2, 0), dtype=np.int64)}, r"shape \(2, 0\)"),
        ({"input_ids": np.ones((1, 4), dtype=np.float32)}, r"expected integers.*got float32"),
        ({"input_ids": np.array([["a", "text"]])}, r"expected integers.*got <U4"),
        ({}, r"without input_ids"),
        ({"input_ids": None}, r"without input_ids"),
        (
            given(2, 3) | {"attention_mask": np.ones((2, 4), dtype=np.int64)},
            r"attention_mask.*\(2, 4\).*\(2, 3\)",
        ),
        (
            given(2, 3) | {"attention_mask": np.ones(3, dtype=np.int64)},
            r"attention_mask: .*got int64 of shape \(3,\)",
        ),
        (
            given(2, 3) | {"attention_mask": np.full((2, 3), 0.5)},
            r"attention_mask: expected integers.*got float64",
        ),
        (given(2, 3) | {"labels": np.ones((2,))}, r"no input 'labels'.*input_ids, attention_mask"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_with_what_is_needed(inputs: Arrays, says: str) -> None:
    with pytest.raises(InputError, match=says):
        complete_inputs(record("1x8", "1x16"), inputs)


@pytest.mark.parametrize(
    ("name", "axes", "says"),
    [
        (
            "input_ids",
            ("batch", "sequence"),
            "Call the tokenizer with return_tensors='pt' or 'np' and padding=True.",
        ),
        (
            "input_values",
            ("batch", "sequence"),
            "Call the processor with return_tensors='pt' or 'np' and padding=",
        ),
        ("pixel_values", ("batch", 3, 8, 8), "Call the processor with return_tensors='pt' or 'np'."),
    ],
)
def test_wrong_shape_names_the_call_that_prepares_the_input(name: str, axes: tuple[Axis, ...], says: str) -> None:
    dtype = "int64" if name == "input_ids" else "float32"
    tensors = (TensorRecord(name=name, dtype=dtype, axes=axes),)
    component = record("1x8").model_copy(update={"inputs": tensors})
    with pytest.raises(InputError) as caught:
        complete_inputs(component, {name: np.zeros((2, 2, 2), dtype)})
    assert caught.value.hint.startswith(says)


def test_token_types_of_a_model_that_has_one_are_refused_unless_all_zero() -> None:
    component = record(inputs=("input_ids", "attention_mask"))
    ids = np.array([[1, 2, 3]])
    assert "token_type_ids" not in complete_inputs(component, {"input_ids": ids, "token_type_ids": ids * 0})
    with pytest.raises(InputError, match="one token type"):
        complete_inputs(component, {"input_ids": ids, "token_type_ids": ids})


def test_mask_of_a_model_that_has_none_is_refused_unless_all_one() -> None:
    component = record(inputs=("input_ids",))
    ids = np.array([[1, 2, 3]])
    assert list(complete_inputs(component, {"input_ids": ids, "attention_mask": ids > 0})) == ["input_ids"]
    with pytest.raises(InputError, match="no attention mask"):
        complete_inputs(component, {"input_ids": ids, "attention_mask": ids > 1})


@pytest.mark.parametrize("value", [-1, 3, 2**40])
@pytest.mark.parametrize("name", ["input_ids", "token_type_ids"])
def test_number_beyond_a_table_of_the_model_is_refused(name: str, value: int) -> None:
    tables = record(inputs=("input_ids", "attention_mask", "token_type_ids")).model_copy(update={"vocab_size": 3})
    inputs = [tensor.model_copy(update={"below": 3 if tensor.name == name else None}) for tensor in tables.inputs]
    component = tables.model_copy(update={"inputs": tuple(inputs)})
    ids = np.array([[0, 1, 2]])
    assert complete_inputs(component, {"input_ids": ids, name: ids})[name].tolist() == ids.tolist()
    with pytest.raises(InputError, match=f"{name} contains {value}, but the model takes numbers from 0 to 2"):
        complete_inputs(component, {"input_ids": ids, name: np.array([[0, value, 2]])})


def test_any_token_id_is_taken_where_the_table_is_unknown() -> None:
    ids = np.array([[0, 2**40]])
    assert complete_inputs(record(), {"input_ids": ids})["input_ids"].tolist() == ids.tolist()


TYPED = record(inputs=("input_ids", "token_type_ids", "attention_mask")).model_copy(update={"vocab_size": 50})


@pytest.mark.parametrize(
    "tokens",
    [{"input_ids": [7, 8]}, {"input_ids": [7, 8], "token_type_ids": [0, 1], "unread_by_the_model": [3, 3]}],
    ids=str,
)
def test_row_of_a_tokenizers_lists_is_what_the_arrays_give(tokens: dict[str, list[int]]) -> None:
    row = token_row(TYPED, tokens)
    assert {name: values.tolist() for name, values in row.items()} == {
        "input_ids": [[7, 8]],
        "token_type_ids": [tokens.get("token_type_ids", [0, 0])],
        "attention_mask": [[1, 1]],
    }
    assert {values.dtype.name for values in row.values()} == {"int64"}


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ({"input_ids": [7, 50]}, "contains 50, but the model takes numbers from 0 to 49"),
        ({"input_ids": [-1, 7]}, "contains -1"),
        ({"input_ids": [7] * 17}, "17 tokens, but the model was compiled for at most 16"),
        ({"input_ids": [7, 8], "token_type_ids": [0]}, "token_type_ids has shape (1, 1)"),
    ],
)
def test_row_of_a_tokenizers_lists_is_refused_as_arrays_are(tokens: dict[str, list[int]], words: str) -> None:
    with pytest.raises(InputError) as lists:
        token_row(TYPED, tokens)
    with pytest.raises(InputError) as arrays:
        complete_inputs(TYPED, {name: np.array([values]) for name, values in tokens.items()})
    assert words in str(lists.value) == str(arrays.value)
