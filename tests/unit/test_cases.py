"""Cases of a validation: every required case is present, and none is longer than the model accepts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from compileflow.errors import MeasurementError
from compileflow.spec import HfTask
from compileflow.validation.cases import (
    ODD_TEXTS,
    Case,
    CaseBuilder,
    agreement_cases,
    load_examples,
    shape_cases,
)
from tests.conftest import ModelFactory
from tests.models import sentences

MAX_LENGTH = 48
EDGES = (8, 16, 48)


def _builder(folder: Path, *, max_length: int = MAX_LENGTH, edges: tuple[int, ...] = EDGES) -> CaseBuilder:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return CaseBuilder(
        tokenizer=tokenizer,
        input_names=("input_ids", "attention_mask", "token_type_ids"),
        max_length=max_length,
        edges=edges,
        pad_token_id=tokenizer.pad_token_id,
    )


@pytest.fixture
def builder(tiny_model: ModelFactory) -> CaseBuilder:
    return _builder(tiny_model(HfTask.TEXT_CLASSIFICATION))


@pytest.fixture
def by_name(builder: CaseBuilder) -> dict[str, Case]:
    cases = shape_cases(builder, sentences())
    assert len({case.name for case in cases}) == len(cases)
    return {case.name: case for case in cases}


def _length(case: Case) -> int:
    return int(case.inputs["input_ids"].shape[1])


@pytest.mark.parametrize("edge", [8, 16])
def test_each_bucket_edge_is_met_from_both_sides(by_name: dict[str, Case], edge: int) -> None:
    for length in (edge - 1, edge, edge + 1):
        assert _length(by_name[f"length {length}"]) == length


def test_shortest_and_longest_inputs_are_there(by_name: dict[str, Case]) -> None:
    assert _length(by_name["length 1"]) == 1
    assert _length(by_name[f"length {MAX_LENGTH}"]) == MAX_LENGTH
    assert f"length {MAX_LENGTH + 1}" not in by_name


def test_text_beyond_the_maximum_is_truncated_to_it(by_name: dict[str, Case], builder: CaseBuilder) -> None:
    ids = by_name["beyond the maximum, truncated"].inputs["input_ids"][0]
    assert len(ids) == MAX_LENGTH
    assert ids[-1] == builder.tokenizer.sep_token_id


def test_empty_string_is_special_tokens_alone(by_name: dict[str, Case], builder: CaseBuilder) -> None:
    case = by_name["empty"]
    assert case.texts == ("",)
    assert case.inputs["input_ids"][0].tolist() == [
        builder.tokenizer.cls_token_id,
        builder.tokenizer.sep_token_id,
    ]


@pytest.mark.parametrize(
    ("name", "character"),
    [("emoji", "\U0001f600"), ("CJK", "東"), ("zero-width", "\u200b"), ("control characters", "\x00")],
)
def test_odd_texts_are_not_altered(by_name: dict[str, Case], name: str, character: str) -> None:
    assert character in by_name[name].texts[0]
    assert by_name[name].family == "text"


def test_every_odd_text_has_its_case(by_name: dict[str, Case]) -> None:
    assert set(ODD_TEXTS) <= set(by_name)


def test_unknown_words_hold_the_unknown_token(by_name: dict[str, Case], builder: CaseBuilder) -> None:
    assert builder.tokenizer.unk_token_id in by_name["unknown words"].inputs["input_ids"]


def test_special_tokens_stand_in_the_text_itself(by_name: dict[str, Case], builder: CaseBuilder) -> None:
    inside = by_name["special tokens"].inputs["input_ids"][0][1:-1].tolist()
    assert set(builder.tokenizer.all_special_ids) <= set(inside)


def test_one_batch_is_padded_on_the_right_and_on_the_left(by_name: dict[str, Case]) -> None:
    right, left = by_name["ragged batch, padded right"], by_name["ragged batch, padded left"]
    assert right.texts == left.texts
    assert 0 in right.mask
    assert (np.diff(right.mask, axis=1) <= 0).all()
    assert (np.diff(left.mask, axis=1) >= 0).all()
    for row in range(len(right.texts)):
        unpadded = [case.inputs["input_ids"][row][case.mask[row] == 1] for case in (right, left)]
        assert unpadded[0].tolist() == unpadded[1].tolist()
    first_row = by_name["the batch's first row alone"]
    assert first_row.texts == right.texts[:1]
    assert len(first_row.inputs["input_ids"]) == 1 < len(right.inputs["input_ids"])


@pytest.mark.parametrize("omitted", ["token_type_ids", "attention_mask"])
def test_an_input_is_omitted(by_name: dict[str, Case], omitted: str) -> None:
    case = by_name[f"without {omitted}"]
    assert set(case.inputs) == {"input_ids", "attention_mask", "token_type_ids"} - {omitted}
    # The omitted input equals the model's default, so both models must agree.
    assert case.mask.all()


def test_text_pair_has_both_token_types(by_name: dict[str, Case]) -> None:
    assert set(by_name["text pair"].inputs["token_type_ids"][0]) == {0, 1}


@pytest.mark.parametrize("max_length", [4, 7, MAX_LENGTH])
@pytest.mark.parametrize("task", [HfTask.TEXT_CLASSIFICATION, HfTask.FILL_MASK])
def test_nothing_exceeds_the_maximum(tiny_model: ModelFactory, max_length: int, task: HfTask) -> None:
    builder = _builder(tiny_model(task), max_length=max_length, edges=(4, 8, 64))
    examples = [{"text": text} for text in sentences()[:40]]
    cases = shape_cases(builder, sentences()) + agreement_cases(builder, examples, task)
    assert max(_length(case) for case in cases) == max_length
    for case in cases:
        assert all(value.shape == case.mask.shape for value in case.inputs.values())
        assert all(value.dtype == np.int64 for value in case.inputs.values())


def test_inputs_hold_only_what_the_model_takes(tiny_model: ModelFactory) -> None:
    whole = _builder(tiny_model(HfTask.TEXT_CLASSIFICATION, "distilbert"))
    builder = CaseBuilder(whole.tokenizer, ("input_ids", "attention_mask"), MAX_LENGTH, EDGES, 0)
    cases = shape_cases(builder, sentences())
    assert {name for case in cases for name in case.inputs} == {"input_ids", "attention_mask"}
    assert not any(case.name == "without token_type_ids" for case in cases)


def test_few_sentences_are_enough_for_the_shape_cases(builder: CaseBuilder) -> None:
    cases = {case.name: case for case in shape_cases(builder, ["One short example."])}
    assert len(cases["ragged batch, padded right"].texts) == 1


def _agreement(builder: CaseBuilder, texts: Sequence[str], task: HfTask) -> list[Case]:
    return agreement_cases(builder, [{"text": text} for text in texts], task)


def test_agreement_cases_hold_every_example_once(builder: CaseBuilder) -> None:
    texts = sentences()[:21]
    cases = _agreement(builder, texts, HfTask.TEXT_CLASSIFICATION)
    assert sorted(text for case in cases for text in case.texts) == sorted(texts)
    assert [len(case.texts) for case in cases] == [8, 8, 5]
    assert {case.family for case in cases} == {"agreement"}


def test_fill_mask_masks_one_real_token_a_row(tiny_model: ModelFactory) -> None:
    builder = _builder(tiny_model(HfTask.FILL_MASK))
    for case in _agreement(builder, sentences()[:16], HfTask.FILL_MASK):
        is_mask = case.inputs["input_ids"] == builder.tokenizer.mask_token_id
        assert is_mask.sum(axis=1).tolist() == [1] * len(case.texts)
        assert is_mask.argmax(axis=1).tolist() == list(case.positions)


def test_fill_mask_without_a_mask_token_is_refused(tiny_model: ModelFactory) -> None:
    builder = _builder(tiny_model(HfTask.FILL_MASK))
    builder.tokenizer.mask_token = None
    with pytest.raises(MeasurementError, match="no mask token"):
        _agreement(builder, sentences()[:2], HfTask.FILL_MASK)


def test_questions_become_pairs(tiny_model: ModelFactory) -> None:
    builder = _builder(tiny_model(HfTask.QUESTION_ANSWERING))
    examples, _, _ = load_examples(HfTask.QUESTION_ANSWERING, None, 3)
    (case,) = agreement_cases(builder, examples, HfTask.QUESTION_ANSWERING)
    assert (case.inputs["token_type_ids"].max(axis=1) == 1).all()


def test_the_library_carries_320_distinct_sentences() -> None:
    examples, origin, digest = load_examples(HfTask.TEXT_CLASSIFICATION, None, 1000)
    assert len({example["text"] for example in examples}) == len(examples) == 320
    assert "compileflow's own" in origin
    assert len(digest) == 64


def test_the_library_carries_300_questions_with_their_contexts() -> None:
    examples, _, _ = load_examples(HfTask.QUESTION_ANSWERING, None, 1000)
    assert len({(example["question"], example["context"]) for example in examples}) == len(examples) == 300
    assert all(example["question"].strip() and example["context"].strip() for example in examples)


def test_users_examples_as_plain_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes("first one\r\n\nsecond, 東京\n".encode())
    examples, origin, _ = load_examples(HfTask.TEXT_CLASSIFICATION, str(path), 10)
    assert examples == [{"text": "first one"}, {"text": "second, 東京"}]
    assert origin == "mine.txt"
    assert len(load_examples(HfTask.TEXT_CLASSIFICATION, str(path), 1)[0]) == 1


def test_users_examples_as_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    # U+2028 ends a line for str.splitlines, but not in JSON.
    rows = [{"text": "a\u2028b"}, {"text": "c", "label": 1}]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(f"\ufeff{lines}\n", "utf-8")
    examples, _, _ = load_examples(HfTask.TOKEN_CLASSIFICATION, str(path), 10)
    assert examples == [{"text": "a\u2028b"}, {"text": "c"}]
    path.write_text('{"question": "q?", "context": "c", "answers": []}\n', "utf-8")
    assert load_examples(HfTask.QUESTION_ANSWERING, str(path), 10)[0] == [{"question": "q?", "context": "c"}]


@pytest.mark.parametrize(
    ("task", "body", "says"),
    [
        (HfTask.TEXT_CLASSIFICATION, b"", "holds no example"),
        (HfTask.TEXT_CLASSIFICATION, b"\n  \n", "holds no example"),
        (HfTask.TEXT_CLASSIFICATION, b'{"sentence": "x"}\n', "text is missing in line 1"),
        (HfTask.TEXT_CLASSIFICATION, b'{"text": null}\n', "text is not a string in line 1"),
        (HfTask.TEXT_CLASSIFICATION, b'{"text": "x"\n', "cannot be used"),
        (
            HfTask.TEXT_CLASSIFICATION,
            b'{"text": "x"}\n\n{"text" "y"}\n',
            'line 3 is not JSON: Expecting \':\' delimiter at column 9: {"text" "y"}',
        ),
        (
            HfTask.QUESTION_ANSWERING,
            b'{"question": "q", "context": "c"}\nplain\n',
            "line 2 is not JSON with question",
        ),
        (HfTask.TEXT_CLASSIFICATION, b'a\n{"text": "a \\ud800"}\n', "half of a surrogate pair.* in line 2"),
        (HfTask.TEXT_CLASSIFICATION, b'{"text": "a", "x": ' + b"[" * 100_000, "line 1 is nested too deeply"),
        (HfTask.TEXT_CLASSIFICATION, b'{"text": "a", "text": "b"}', "it repeats the name 'text' in line 1"),
        (HfTask.TEXT_CLASSIFICATION, b"a\ncaf\xe9\n", "line 2 is not UTF-8.* Save the file as UTF-8"),
        (HfTask.TEXT_CLASSIFICATION, b"\xff\xfe\x00", "cannot be used"),
        (HfTask.QUESTION_ANSWERING, b"plain text\n", "not JSON with question and context"),
        (HfTask.QUESTION_ANSWERING, b'{"question": "q"}\n', "context is missing in line 1"),
    ],
)
def test_unusable_examples_give_one_clear_error(tmp_path: Path, task: HfTask, body: bytes, says: str) -> None:
    path = tmp_path / "mine"
    path.write_bytes(body)
    with pytest.raises(MeasurementError, match=says) as caught:
        load_examples(task, str(path), 10)
    assert str(path) in str(caught.value)
    if says != "holds no example":
        assert ('"question" and "context"' in caught.value.hint) is task.reads_pairs


@pytest.mark.parametrize("name", ["mine.json", "mine.jsonl"])
def test_json_that_is_not_one_object_in_each_line_is_not_read_as_text(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text('[\n  {"text": "a"}\n]\n', "utf-8")
    with pytest.raises(MeasurementError, match="expected JSON lines, one object in each line"):
        load_examples(HfTask.TEXT_CLASSIFICATION, str(path), 10)


@pytest.mark.parametrize("name", ["absent.txt", "."])
def test_examples_that_are_not_a_file_give_one_clear_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(MeasurementError, match="cannot be used"):
        load_examples(HfTask.TEXT_CLASSIFICATION, str(tmp_path / name), 10)
