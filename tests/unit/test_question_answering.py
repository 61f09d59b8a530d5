"""Question answering: the answers of transformers 4's own pipeline, from compiled models.

The golden was made by tests/goldens/make_question_answering.py. Over 200 lines, because all of it shares one set
of compiled models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from compileflow import CompiledModel, CompiledPipeline, CompiledTokenizer, HfTask
from compileflow.contracts import Arrays
from compileflow.errors import InputError, LoadError
from compileflow.serving.answer_spans import AnswerSettings, Window, best_answers, best_spans
from compileflow.serving.component import LoadedComponent
from compileflow.serving.question_answering import QuestionAnsweringPipeline
from compileflow.testing.pipelines import assert_same_result
from tests.goldens.make_question_answering import GOLDEN, fingerprint
from tests.in_process import InProcess
from tests.models import ARCHITECTURES, MAX_TOKENS

# Scores differ by 5e-7 of themselves here; another processor's may by more.
SCORE_RTOL = 1e-3
QUESTION_ANSWERING = HfTask.QUESTION_ANSWERING
RECORDED = json.loads(GOLDEN.read_text("utf-8"))
CONTEXTS = {case["name"]: case["given"]["context"] for case in RECORDED["cases"] if "context" in case["given"]}
SHORT, LONG = CONTEXTS["short context"], CONTEXTS["long context"]
# An ONNX export takes seconds, a trace tenths.
CELLS = [
    pytest.param(target, architecture, marks=pytest.mark.slow if target == "onnx-runtime" else ())
    for target in ("onnx-runtime", "torchscript")
    for architecture in ARCHITECTURES
]

Compiled = Callable[..., Path]


@pytest.fixture(scope="session")
def compiled(tiny_model: Callable[..., Path], in_process: InProcess) -> Compiled:
    """Compile once a session: `compiled(target, architecture)` gives a folder to read only."""

    def make(target: str, architecture: str) -> Path:
        source = tiny_model(QUESTION_ANSWERING, architecture)
        return in_process.compiled(source, target, QUESTION_ANSWERING)

    return make


@pytest.fixture(scope="session")
def pipeline_of(compiled: Compiled) -> Callable[..., CompiledPipeline]:
    return cache(lambda *asked: CompiledPipeline.from_pretrained(compiled(*asked)))


@pytest.fixture
def parts(compiled: Compiled) -> tuple[CompiledModel, CompiledTokenizer]:
    folder = compiled("torchscript", "bert")
    return CompiledModel.from_pretrained(folder), CompiledTokenizer.from_pretrained(folder)


@pytest.fixture
def pipeline(parts: tuple[CompiledModel, CompiledTokenizer]) -> QuestionAnsweringPipeline:
    return QuestionAnsweringPipeline(*parts)


def assert_same_answers(candidate: Any, reference: Any) -> None:
    assert_same_result(candidate, reference, atol=1e-12, rtol=SCORE_RTOL)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_models_are_those_that_the_old_pipeline_was_asked_with(
    tiny_model: Callable[..., Path], architecture: str
) -> None:
    found = fingerprint(tiny_model(QUESTION_ANSWERING, architecture))
    recorded = RECORDED["models"][architecture]

    assert found == recorded | {"weighted_sum": pytest.approx(recorded["weighted_sum"], abs=1e-3)}, (
        "tests/models.py builds another model than the golden's: a new torch draws other random numbers, or the "
        "vocabulary changed. Make the golden again: see tests/goldens/make_question_answering.py."
    )


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: case["name"])
@pytest.mark.parametrize(("target", "architecture"), CELLS)
def test_answers_are_those_of_the_old_pipeline(
    pipeline_of: Callable[..., CompiledPipeline], target: str, architecture: str, case: dict[str, Any]
) -> None:
    answers = pipeline_of(target, architecture)(**case["given"], **case["settings"])

    assert_same_answers(answers, case["answers"][architecture])
    json.dumps(answers)


def test_settings_of_the_constructor_hold_until_the_call_says_otherwise(compiled: Compiled) -> None:
    pipeline = CompiledPipeline.from_pretrained(compiled("torchscript", "bert"), top_k=2, max_answer_len=1)

    assert len(pipeline(question="Who?", context=SHORT)) == 2
    assert isinstance(pipeline(question="Who?", context=SHORT, top_k=1), dict)
    # As in transformers, None is the same as saying nothing.
    assert pipeline(question="Who?", context=SHORT, top_k=None) == pipeline(question="Who?", context=SHORT)
    assert pipeline.task == "question-answering"


def test_objects_and_iterators_are_answered_like_dicts(pipeline: QuestionAnsweringPipeline) -> None:
    examples = [{"question": "Who?", "context": SHORT}, {"question": "When?", "context": LONG}]
    expected = pipeline(examples)
    seen = []

    def generate() -> Iterator[dict[str, str]]:
        for example in examples:
            seen.append(example)
            yield example

    answers = pipeline(generate())

    assert_same_answers(pipeline([SimpleNamespace(**example) for example in examples]), expected)
    assert_same_answers(pipeline(SimpleNamespace(**examples[0])), expected[0])
    assert_same_answers(next(answers), expected[0])
    assert seen == examples[:1]
    assert_same_answers(list(answers), expected[1:])
    assert pipeline([]) == []


class Watched:
    """A graph that remembers the shape of each batch."""

    def __init__(self, graph: LoadedComponent):
        self.graph, self.record = graph, graph.record
        self.shapes: list[tuple[int, ...]] = []

    def run(self, inputs: Arrays) -> Arrays:
        self.shapes.append(inputs["input_ids"].shape)
        return self.graph.run(inputs)


def test_windows_of_all_questions_share_batches_and_answers_keep_their_order(compiled: Compiled) -> None:
    # A graph that takes any shape, so that nothing but batch_size limits a batch.
    folder = compiled("onnx-runtime", "bert")
    model = CompiledModel.from_pretrained(folder)
    watched = Watched(model.graph)
    model.graph = watched
    pipeline = QuestionAnsweringPipeline(model, CompiledTokenizer.from_pretrained(folder))
    contexts = [SHORT, LONG, SHORT, LONG]

    single_answers = [pipeline(question="Who?", context=context) for context in contexts]
    windows = sum(rows for rows, _ in watched.shapes)
    watched.shapes.clear()
    answers = pipeline(question=["Who?"] * len(contexts), context=contexts, batch_size=3)

    assert_same_answers(answers, single_answers)
    rows_of_calls = [rows for rows, _ in watched.shapes]
    assert sum(rows_of_calls) == windows
    assert max(rows_of_calls) == 3
    assert len(rows_of_calls) < windows / 2
    # Of like length: the two short ones come last.
    assert watched.shapes[0] == (3, MAX_TOKENS)
    assert watched.shapes[-1][1] < MAX_TOKENS


def test_context_comes_first_where_the_tokenizer_pads_on_the_left(
    parts: tuple[CompiledModel, CompiledTokenizer], tiny_model: Callable[..., Path]
) -> None:
    model, tokenizer = parts
    tokenizer.padding_side = "left"
    question, context = "Who?", "We met Anna in Oslo."
    source = transformers.AutoModelForQuestionAnswering.from_pretrained(tiny_model(QUESTION_ANSWERING)).eval()
    encoded = tokenizer.tokenizer(context, question, return_tensors="pt", return_offsets_mapping=True)
    offsets = encoded.pop("offset_mapping")[0].tolist()
    with torch.inference_mode():
        logits = source(**encoded)
    expected = (-np.inf, 0, 0)
    tokens = [place for place, sequence in enumerate(encoded.sequence_ids(0)) if sequence == 0]
    starts, ends = logits.start_logits[0].tolist(), logits.end_logits[0].tolist()
    for first in tokens:
        for last in tokens[tokens.index(first) :]:
            expected = max(expected, (starts[first] + ends[last], offsets[first][0], offsets[last][1]))

    # Short and long in one batch: the short one's tokens keep their positions.
    answer, _ = QuestionAnsweringPipeline(model, tokenizer, align_to_words=False, max_answer_len=MAX_TOKENS)(
        question=[question, question], context=[context, LONG]
    )

    assert (answer["start"], answer["end"]) == expected[1:]
    assert answer["answer"] == context[answer["start"] : answer["end"]]


def test_context_of_white_space_has_the_empty_answer(pipeline: QuestionAnsweringPipeline) -> None:
    empty = {"start": 0, "end": 0, "answer": ""}

    assert pipeline(question="Who?", context=" \n ") == empty | {"score": 0.0}
    assert pipeline(question="Who?", context=" ", top_k=3) == [empty | {"score": 0.0}]
    assert pipeline(question="Who?", context=" ", handle_impossible_answer=True) == empty | {
        "score": pytest.approx(1.0)
    }


def test_long_question_is_cut_and_overlap_shrinks_to_what_is_left(pipeline: QuestionAnsweringPipeline) -> None:
    long_question = "who is the man of the house in the town? " * 9

    says = rf"question has {MAX_TOKENS} tokens.*no room for the context in a window of {MAX_TOKENS}"
    with pytest.raises(InputError, match=says):
        pipeline(question=long_question, context=LONG)
    answer = pipeline(question=long_question, context=LONG, max_question_len=50)
    assert LONG[answer["start"] : answer["end"]] == answer["answer"]
    assert answer["answer"]
    # What is cut off does not matter.
    assert pipeline(question=f"{long_question} why", context=LONG, max_question_len=50) == answer


def test_overlap_as_long_as_a_window_is_refused_where_there_is_more_than_one(
    pipeline: QuestionAnsweringPipeline,
) -> None:
    with pytest.raises(InputError, match=rf"doc_stride is {MAX_TOKENS} tokens.*Lower doc_stride"):
        pipeline(question="Who?", context=LONG, doc_stride=MAX_TOKENS)
    assert pipeline(question="Who?", context="Anna.", doc_stride=MAX_TOKENS)["answer"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "The question is missing"),
        ({"question": "Who?"}, "The context is missing"),
        ({"question": None, "context": SHORT}, "The question is missing"),
        ({"question": "", "context": SHORT}, "The question is an empty text"),
        ({"question": "Who?", "context": ""}, "The context is an empty text"),
        ({"question": "Who?", "context": [SHORT, LONG]}, "The context is of type list"),
        ({"question": ["Who?", 7], "context": SHORT}, "The question is of type int"),
        ({"question": ["Who?", "When?"], "context": [SHORT]}, "2 questions and 1 contexts"),
        ({"inputs": {"question": "Who?"}}, "The context is missing"),
        ({"inputs": [{"question": "Who?", "context": SHORT}, {"context": SHORT}]}, "The question is missing"),
        ({"inputs": "Who?"}, r"input of type str.*context"),
        ({"inputs": 7}, "input of type int"),
        ({"inputs": {"question": "Who?", "context": SHORT}, "question": "Who?"}, "passed twice"),
    ],
    ids=str,
)
def test_question_or_context_that_is_not_there_is_refused(
    pipeline: QuestionAnsweringPipeline, given: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        pipeline(**given)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"topk": 2}, r"no setting 'topk'.*The settings are: top_k, doc_stride, max_answer_len"),
        ({"top_k": 0}, "top_k must be an integer of at least 1, got 0"),
        ({"max_answer_len": "5"}, "max_answer_len must be .*, got '5'"),
        ({"max_seq_len": -1}, "max_seq_len must be .*, got -1"),
        ({"doc_stride": -1}, "doc_stride must be an integer of at least 0, got -1"),
        ({"align_to_words": 1}, "align_to_words must be True or False, got 1"),
        ({"batch_size": 0}, "batch_size must be .*, got 0"),
        ({"top_k": True}, "top_k must be .*, got True"),
    ],
    ids=str,
)
def test_setting_of_no_use_is_refused_by_constructor_and_call(
    parts: tuple[CompiledModel, CompiledTokenizer], settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        QuestionAnsweringPipeline(*parts, **settings)
    with pytest.raises(InputError, match=says):
        QuestionAnsweringPipeline(*parts)(question="Who?", context=SHORT, **settings)


def test_tokenizer_without_offsets_is_refused(parts: tuple[CompiledModel, CompiledTokenizer]) -> None:
    with pytest.raises(LoadError, match=r"where in the text.*fast tokenizer"):
        QuestionAnsweringPipeline(parts[0], SimpleNamespace(is_fast=False))


@pytest.mark.parametrize("null", [0, 11, None])
@pytest.mark.parametrize("longest", [1, 4, 99])
def test_best_spans_are_those_of_all_spans(null: int | None, longest: int) -> None:
    random = np.random.default_rng(longest)
    # Wide enough that most probabilities are 0 in float32.
    start, end = random.normal(0, 60, (2, 12)).astype(np.float32)
    in_context = np.zeros(12, dtype=bool)
    in_context[3:10] = True
    considered = [*range(3, 10), *([] if null is None else [null])]
    every = sorted(
        (
            (float(start[first]) + float(end[last]), first, last)
            for first in range(3, 10)
            for last in range(first, min(first + longest, 10))
        ),
        reverse=True,
    )

    spans, null_score = best_spans(start, end, in_context, null, count=50, longest=longest)

    assert [(span.first, span.last) for span in spans] == [(first, last) for _, first, last in every]
    weights = [np.exp(logits[considered].astype(np.float64)) for logits in (start, end)]
    total = weights[0].sum() * weights[1].sum()
    assert [span.score for span in spans] == pytest.approx([np.exp(score) / total for score, _, _ in every])
    expected = 0.0 if null is None else float(np.exp(float(start[null]) + float(end[null])) / total)
    assert null_score == pytest.approx(expected)


def test_same_text_in_two_windows_is_one_answer_with_both_scores() -> None:
    context = "Oslo OSLO"
    settings = AnswerSettings(top_k=3, handle_impossible_answer=True)

    def read(first: int, null: float) -> tuple[Window, Any, Any]:
        """One window: the null token, and one token of the context."""
        window = Window(
            inputs={},
            in_context=np.array([False, True]),
            null=0,
            offsets=np.array([[0, 0], [first, first + 4]]),
            words=np.array([-1, 0]),
        )
        logits = np.log(np.array([null, 1 - null]))
        return window, logits, logits

    answers = best_answers([read(0, 0.4), read(5, 0.2)], context, settings)

    assert answers == [
        {"score": pytest.approx(0.6**2 + 0.8**2), "start": 0, "end": 4, "answer": "Oslo"},
        {"score": pytest.approx(0.2**2), "start": 0, "end": 0, "answer": ""},
    ]
