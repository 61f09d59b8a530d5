"""Lists through compiled pipelines: batches of similar length give the answers of one text at a time, in order."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from compileflow import CompiledPipeline, HfTask
from compileflow.contracts import Arrays
from compileflow.errors import InputError
from compileflow.serving import rows
from compileflow.serving.list_calls import call_list
from compileflow.testing.pipelines import assert_same_result
from compileflow.testing.targets import BUCKETS
from tests.in_process import InProcess
from tests.models import sentences
from tests.unit.run_counter import RunCounter, counted

TARGETS = ("torchscript", "onnx-runtime")
TASKS = (
    HfTask.FEATURE_EXTRACTION,
    HfTask.TEXT_CLASSIFICATION,
    HfTask.TOKEN_CLASSIFICATION,
    HfTask.FILL_MASK,
)
# A compiled pipeline always truncates; pipelines of transformers truncate with one of three settings.
TRUNCATED: dict[HfTask, dict[str, Any]] = {
    HfTask.FEATURE_EXTRACTION: {"truncation": True},
    HfTask.TEXT_CLASSIFICATION: {"truncation": True},
    HfTask.TOKEN_CLASSIFICATION: {},
    HfTask.FILL_MASK: {"tokenizer_kwargs": {"truncation": True}},
}
TENSORS: dict[HfTask, dict[str, Any]] = {HfTask.FEATURE_EXTRACTION: {"return_tensors": True}}
WORDS = " ".join(sentences()).split()

Load = Callable[..., CompiledPipeline]
Reference = Callable[..., Any]


@pytest.fixture(scope="session")
def compiled(tiny_model: Callable[..., Path], in_process: InProcess) -> Callable[..., Path]:
    """Compile small models once a session."""

    def make(target: str, hf_task: HfTask, architecture: str = "bert") -> Path:
        return in_process.compiled(tiny_model(hf_task, architecture), target, hf_task)

    return make


@pytest.fixture
def load(compiled: Callable[..., Path]) -> Load:
    """Load a compiled pipeline afresh: `load(target, task, architecture, **settings)`."""

    def make(target: str, hf_task: HfTask, architecture: str = "bert", **settings: Any) -> CompiledPipeline:
        return CompiledPipeline.from_pretrained(compiled(target, hf_task, architecture), **settings)

    return make


@pytest.fixture(scope="session")
def reference(tiny_model: Callable[..., Path]) -> Reference:
    """Load transformers' own pipeline around a source model, once a session."""
    return cache(
        lambda task, architecture="bert": transformers.pipeline(
            task.value, model=str(tiny_model(task, architecture)), device="cpu"
        )
    )


def ragged(hf_task: HfTask, count: int = 17, *, mask: str = "[MASK]") -> list[str]:
    """Texts of 1 to 90 words in no order of length, the second one empty, some beyond what the model takes."""
    draw = random.Random(count)  # noqa: S311 - a test's texts
    lengths = [draw.randint(1, 24) for _ in range(count - 2)] + [90, 70]
    draw.shuffle(lengths)
    texts = [" ".join(draw.sample(WORDS, length)) for length in lengths]
    texts[1] = ""
    return [f"{mask} {text}" for text in texts] if hf_task is HfTask.FILL_MASK else texts


@pytest.mark.parametrize("batch_size", [1, 3, 8, 64, None])
@pytest.mark.parametrize("hf_task", TASKS)
@pytest.mark.parametrize("target", TARGETS)
def test_list_is_answered_as_transformers_answers_one_text_at_a_time(
    load: Load, reference: Reference, target: str, hf_task: HfTask, batch_size: int | None
) -> None:
    texts, settings = ragged(hf_task), TENSORS.get(hf_task, {})
    pipeline = load(target, hf_task)
    expected = reference(hf_task)(texts, **settings, **TRUNCATED[hf_task])

    assert_same_result(pipeline(texts, batch_size=batch_size, **settings), expected)


@pytest.mark.parametrize("hf_task", TASKS)
def test_positions_counted_from_the_padding_are_those_of_a_single_text(
    load: Load, reference: Reference, hf_task: HfTask
) -> None:
    texts, settings = ragged(hf_task, mask="<mask>"), TENSORS.get(hf_task, {})
    expected = reference(hf_task, "roberta")(texts, **settings, **TRUNCATED[hf_task])

    assert_same_result(load("torchscript", hf_task, "roberta")(texts, **settings), expected)


@pytest.mark.parametrize(
    ("hf_task", "settings"),
    [
        (HfTask.FEATURE_EXTRACTION, {"truncation": True}),
        (HfTask.FEATURE_EXTRACTION, {"tokenize_kwargs": {"truncation": True, "max_length": 9}}),
        (HfTask.TEXT_CLASSIFICATION, {"top_k": None, "truncation": True}),
        (HfTask.TEXT_CLASSIFICATION, {"top_k": 2, "function_to_apply": "sigmoid", "truncation": True}),
        (HfTask.TEXT_CLASSIFICATION, {"function_to_apply": "none", "truncation": True, "max_length": 6}),
        (HfTask.TOKEN_CLASSIFICATION, {"aggregation_strategy": "simple"}),
        (HfTask.TOKEN_CLASSIFICATION, {"aggregation_strategy": "max", "ignore_labels": ["B-PER"]}),
        # Long texts come in overlapping pieces.
        (HfTask.TOKEN_CLASSIFICATION, {"aggregation_strategy": "first", "stride": 8}),
        (HfTask.FILL_MASK, {"top_k": 2, "tokenizer_kwargs": {"truncation": True}}),
        (HfTask.FILL_MASK, {"targets": ["the", "a"], "tokenizer_kwargs": {"truncation": True}}),
    ],
)
@pytest.mark.parametrize("target", TARGETS)
def test_settings_of_a_call_work_as_in_transformers(
    load: Load, reference: Reference, target: str, hf_task: HfTask, settings: dict[str, Any]
) -> None:
    texts = ragged(hf_task, 7)

    answers = load(target, hf_task)(texts, batch_size=3, **settings)

    assert_same_result(answers, reference(hf_task)(texts, **settings))


def test_settings_of_the_pipeline_hold_for_lists(load: Load, reference: Reference) -> None:
    texts = ragged(HfTask.TEXT_CLASSIFICATION)
    pipeline = load("onnx-runtime", HfTask.TEXT_CLASSIFICATION, top_k=None, batch_size=4)
    runs = counted(pipeline)

    answers = pipeline(texts)

    expected = reference(HfTask.TEXT_CLASSIFICATION)(texts, top_k=None, truncation=True)
    assert_same_result(answers, expected)
    assert max(rows for rows, _ in runs.shapes) == 4
    pipeline(texts, batch_size=2)
    assert max(rows for rows, _ in runs.shapes[-len(texts) // 2 :]) == 2


@pytest.mark.parametrize("target", TARGETS)
def test_text_pairs_and_words_are_answered_as_in_transformers(
    load: Load, reference: Reference, target: str
) -> None:
    hf_task = HfTask.TEXT_CLASSIFICATION
    texts = ragged(hf_task)
    pairs: list[Any] = [{"text": first, "text_pair": second} for first, second in pairwise(texts)]
    pairs.append("no pair")
    expected = reference(hf_task)(pairs, truncation=True)
    assert_same_result(load(target, hf_task)(pairs, batch_size=4), expected)

    hf_task = HfTask.TOKEN_CLASSIFICATION
    words = [text.split() or ["one"] for text in ragged(hf_task, 9)]
    settings = {"is_split_into_words": True, "delimiter": "_"}
    assert_same_result(load(target, hf_task)(words, **settings), reference(hf_task)(words, **settings))
    # A list of words is one item.
    assert_same_result(load(target, hf_task)(words[0], **settings), reference(hf_task)(words[0], **settings))


@pytest.mark.parametrize("inputs", [["one text"], [""], ["", ""], []])
def test_shortest_lists_are_answered_as_in_transformers(
    load: Load, reference: Reference, inputs: list[str]
) -> None:
    for hf_task in (HfTask.TEXT_CLASSIFICATION, HfTask.FEATURE_EXTRACTION):
        pipeline = load("torchscript", hf_task).pipeline
        if inputs:
            assert_same_result(call_list(pipeline, inputs), reference(hf_task)(inputs))
        else:
            with pytest.raises(IndexError) as expected:
                reference(hf_task)(inputs)
            with pytest.raises(IndexError, match=str(expected.value)):
                call_list(pipeline, inputs)


def without_mask(inputs: Arrays, outputs: Arrays, run: Callable[[Arrays], Arrays]) -> Arrays:
    """Answers in which each text sees its padding."""
    return run(inputs | {"attention_mask": np.ones_like(inputs["attention_mask"])})


def mixed(inputs: Arrays, outputs: Arrays, run: Callable[[Arrays], Arrays]) -> Arrays:
    """Answers in which each text has a hundredth of the text before it in the batch."""
    return {name: 0.99 * value + 0.01 * np.roll(value, 1, axis=0) for name, value in outputs.items()}


@pytest.mark.parametrize("leak", [without_mask, mixed])
def test_text_that_leaks_into_its_neighbour_gets_another_answer_than_alone(
    load: Load, leak: Callable[..., Arrays]
) -> None:
    texts = ragged(HfTask.TEXT_CLASSIFICATION)
    pipeline = load("onnx-runtime", HfTask.TEXT_CLASSIFICATION)
    graph = pipeline.model.graph
    alone = [pipeline(text, top_k=None) for text in texts]
    assert_same_result(pipeline(texts, top_k=None), alone)

    run, close = graph._runner.run, graph._runner.close
    graph._runner = SimpleNamespace(run=lambda inputs: leak(inputs, run(inputs), run), close=close)

    assert_same_result([pipeline(text, top_k=None) for text in texts], alone)
    with pytest.raises(AssertionError):
        assert_same_result(pipeline(texts, top_k=None), alone)


@pytest.mark.parametrize("target", TARGETS)
def test_many_texts_run_in_few_calls_with_little_padding_and_come_back_in_order(
    load: Load, reference: Reference, target: str
) -> None:
    hf_task = HfTask.TEXT_CLASSIFICATION
    texts = ragged(hf_task, 300)
    lengths = [len(row) for row in reference(hf_task).tokenizer(texts, truncation=True)["input_ids"]]
    pipeline = load(target, hf_task)
    runs = counted(pipeline)

    answers = pipeline(texts, top_k=None, batch_size=8)

    assert_same_result(answers, reference(hf_task)(texts, top_k=None, truncation=True))
    assert len({answer[0]["score"] for answer in answers}) > len(texts) // 2
    shapes, unsorted = runs.shapes, RunCounter(runs.runner)
    pipeline.model.graph._runner = unsorted
    pipeline.pipeline(texts, top_k=None, batch_size=8)
    assert sum(lengths) <= runs.computed < unsorted.computed
    if target == "onnx-runtime":
        assert sum(rows for rows, _ in shapes) == len(texts)
        assert max(rows for rows, _ in shapes) == 8
        assert runs.computed <= 1.03 * sum(lengths)
    else:
        # The static graph's only bucket of several rows is 4x16: it is filled.
        short = sum(8 < length <= 16 for length in lengths)
        assert 4 * shapes.count((4, 16)) >= short > 4
        assert set(shapes) <= {(bucket.batch_size, bucket.sequence_length) for bucket in BUCKETS["text"]}


def test_long_list_is_worked_through_in_windows(
    load: Load, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf_task = HfTask.TOKEN_CLASSIFICATION
    texts = ragged(hf_task, 30)
    pipeline = load("onnx-runtime", hf_task)
    expected = reference(hf_task)(texts)
    runs = counted(pipeline)

    monkeypatch.setattr(rows, "_WINDOW_ITEMS", 7)
    assert_same_result(pipeline(texts), expected)
    # Each window's calls are sorted by length, and none has rows of two windows.
    assert {7, 14, 21, 28, 30} <= set(accumulate(rows for rows, _ in runs.shapes))
    runs.shapes.clear()
    # Each item alone is more than enough.
    monkeypatch.setattr(rows, "_WINDOW_BYTES", 1)
    assert_same_result(pipeline(texts), expected)
    assert [rows for rows, _ in runs.shapes] == [1] * len(texts)


@pytest.mark.parametrize("hf_task", TASKS)
def test_side_that_the_tokenizer_pads_on_does_not_matter(
    load: Load, reference: Reference, hf_task: HfTask
) -> None:
    texts, settings = ragged(hf_task), TENSORS.get(hf_task, {})
    pipeline = load("onnx-runtime", hf_task)
    pipeline.tokenizer.padding_side = "left"

    answers = pipeline(texts, **settings)

    assert_same_result(answers, reference(hf_task)(texts, **settings, **TRUNCATED[hf_task]))


def test_threads_get_the_answers_to_their_own_lists(load: Load) -> None:
    hf_task = HfTask.FEATURE_EXTRACTION
    pipeline = load("onnx-runtime", hf_task)
    lists = [ragged(hf_task, count) for count in (11, 13, 17, 19, 23, 29)]
    single_answers = [pipeline(texts, return_tensors=True) for texts in lists]

    with ThreadPoolExecutor(2) as threads:
        answers = list(threads.map(lambda texts: pipeline(texts, return_tensors=True), lists))

    assert_same_result(answers, single_answers)


@pytest.mark.parametrize(
    ("texts", "says"),
    [(["[MASK] a", "no mask", 7], "No mask_token"), (["[MASK] a", 7, "no mask"], "must be of type `str`")],
)
def test_first_item_that_fails_fails_the_call_as_in_transformers(
    load: Load, reference: Reference, texts: list[Any], says: str
) -> None:
    with pytest.raises(Exception, match=says) as expected:
        reference(HfTask.FILL_MASK)(texts)

    with pytest.raises(type(expected.value)) as caught:
        load("onnx-runtime", HfTask.FILL_MASK)(texts)

    assert str(caught.value) == str(expected.value)


def test_item_that_fails_at_its_end_comes_before_a_later_one_that_fails_at_its_start(load: Load) -> None:
    pipeline = load("onnx-runtime", HfTask.TEXT_CLASSIFICATION)

    with pytest.raises(ValueError, match="Unrecognized `function_to_apply`"):
        pipeline(["one", "two and more", 7], function_to_apply=object())
    # The pipeline is as good as before.
    assert pipeline(["one", "two"]) == [pipeline("one")[0], pipeline("two")[0]]


def test_text_that_is_too_long_for_the_graph_and_a_wrong_batch_size_are_refused(load: Load) -> None:
    pipeline = load("onnx-runtime", HfTask.TEXT_CLASSIFICATION)

    with pytest.raises(InputError, match=r"tokens, but the model was compiled for at most"):
        pipeline(["short", " ".join(WORDS[:200])], truncation=False, max_length=None)
    for wrong in (0, -1, 2.0, True):
        with pytest.raises(InputError, match="batch_size is"):
            pipeline(["one", "two"], batch_size=wrong)


def test_answers_do_not_hold_their_batch_in_memory(load: Load) -> None:
    answers = load("onnx-runtime", HfTask.FEATURE_EXTRACTION)(["one", "a longer text", "two"], return_tensors=True)

    for answer in answers:
        assert isinstance(answer, torch.Tensor)
        assert answer.untyped_storage().nbytes() == answer.numel() * np.dtype(np.float32).itemsize
