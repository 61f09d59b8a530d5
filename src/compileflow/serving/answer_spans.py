"""From the logits of an extractive question-answering model to answers: spans of the context, scored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compileflow.contracts import Arrays
from compileflow.errors import InputError

Floats = NDArray[np.floating[Any]]
Answer = dict[str, Any]

# What a window shares with the one before it, in tokens, unless the call says otherwise; as in transformers 4.
_DOC_STRIDE = 128


@dataclass(frozen=True)
class AnswerSettings:
    """Settings of a call. Names and defaults are transformers 4's, but for batch_size, which was 1 there.

    Attributes:
        top_k: How many answers; more than 1 makes each result a list.
        doc_stride: Tokens of context that neighbouring windows share. None: half a window, at most 128.
        max_answer_len: Longest answer, in tokens.
        max_seq_len: Longest window, in tokens, question and special tokens included. Never more than the
            model was compiled for, whatever it says here.
        max_question_len: Tokens of a question; what is longer is cut.
        handle_impossible_answer: Whether "no answer" (an empty text) is an answer, too.
        align_to_words: Whether answers are widened to whole words.
        batch_size: Windows of one run of the model at most. None: 8, or what the largest shape bucket holds.
    """

    top_k: int = 1
    doc_stride: int | None = None
    max_answer_len: int = 15
    max_seq_len: int = 384
    max_question_len: int = 64
    handle_impossible_answer: bool = False
    align_to_words: bool = True
    batch_size: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is field.default:
                continue
            least = 0 if field.name == "doc_stride" else 1
            if isinstance(field.default, bool):
                fits, needed = isinstance(value, bool), "True or False"
            else:
                fits, needed = type(value) is int and value >= least, f"an integer of at least {least}"
            if not fits:
                raise InputError(
                    f"{field.name} is {value!r}; needed is {needed}.",
                    hint=f"Leave it out for the default, {field.default}.",
                )

    def updated(self, given: Mapping[str, Any]) -> AnswerSettings:
        """Return these settings with those that are given; None leaves a setting as it is.

        Raises:
            InputError: a setting is unknown, or its value is of no use.
        """
        names = [field.name for field in fields(self)]
        unknown = sorted(set(given) - set(names))
        if unknown:
            raise InputError(
                f"Question answering has no setting {unknown[0]!r}.", hint=f"There are: {', '.join(names)}."
            )
        return replace(self, **{name: value for name, value in given.items() if value is not None})

    def shared_tokens(self, window_length: int) -> int:
        """Return how many tokens of context neighbouring windows of that many tokens share."""
        return min(window_length // 2, _DOC_STRIDE) if self.doc_stride is None else self.doc_stride


@dataclass(frozen=True)
class Window:
    """A question and one stretch of its context, encoded for the model.

    Attributes:
        inputs: The graph's inputs by name, each of shape (1, length), int64.
        in_context: Which tokens are the context's, shape (length,), bool.
        null: Index of the token that stands for "there is no answer"; None where the tokenizer has none.
        offsets: First character of each token in its own text and the one after its last, shape (length, 2).
        words: Number of the word that each token is part of, -1 where it is part of none, shape (length,).
    """

    inputs: Arrays
    in_context: NDArray[np.bool_]
    null: int | None
    offsets: NDArray[np.int64]
    words: NDArray[np.int64]


@dataclass(frozen=True)
class Span:
    """A candidate: tokens `first` to `last` of a window, both included, and their probability."""

    score: float
    first: int
    last: int


def best_answers(
    read: Iterable[tuple[Window, Floats, Floats]], context: str, settings: AnswerSettings
) -> list[Answer]:
    """Choose the best answers of all windows of one context.

    Spans with the same text, whatever its case, are one answer: their scores are added up, which is why a
    score can be more than 1, and it is placed where it was met first. "No answer" is as probable as the
    window says that finds it least probable.

    Args:
        read: Windows with their start and end logits, each of shape (length,).
        context: The text that the answers are cut from.
        settings: How many answers, of what length, widened to words or not, "no answer" among them or not.

    Returns:
        At least one answer, the best first: {"score", "start", "end", "answer"}, with start and end in
        characters of the context. A context without any token gives the empty answer.

    Source: the question-answering pipeline of transformers 4,
    https://huggingface.co/docs/transformers/v4.57.1/en/main_classes/pipelines
    """
    # Widened to words, several spans may become one answer: more are looked at than are asked for.
    count = 2 * settings.top_k + 10 if settings.align_to_words else settings.top_k
    answers: dict[str, Answer] = {}
    null_scores = []
    for window, start_logits, end_logits in read:
        spans, null_score = best_spans(
            start_logits,
            end_logits,
            window.in_context,
            window.null,
            count=count,
            longest=settings.max_answer_len,
        )
        null_scores.append(null_score)
        for span in spans:
            start, end = _characters(window, span, settings.align_to_words)
            text = context[start:end]
            known = answers.setdefault(text.lower(), {"score": 0.0, "start": start, "end": end, "answer": text})
            known["score"] += span.score
    found = list(answers.values())
    if settings.handle_impossible_answer or not found:
        least = min(null_scores) if settings.handle_impossible_answer else 0.0
        found.append({"score": least, "start": 0, "end": 0, "answer": ""})
    return sorted(found, key=lambda answer: answer["score"], reverse=True)[: settings.top_k]


def best_spans(
    start_logits: Floats,
    end_logits: Floats,
    in_context: NDArray[np.bool_],
    null: int | None,
    *,
    count: int,
    longest: int,
) -> tuple[list[Span], float]:
    """Return the most probable spans of one window, and the probability that it holds no answer.

    A span's probability is softmax(start_logits)[first] * softmax(end_logits)[last], each softmax over the
    context's tokens and the null token.

    Args:
        start_logits: Shape (length,), unnormalised.
        end_logits: Shape (length,), unnormalised.
        in_context: Which tokens an answer may hold, shape (length,); they are neighbours.
        null: Index of the null token, which is never part of a span.
        count: How many spans at most.
        longest: Tokens of a span at most; > 0.

    Returns:
        Spans, the most probable first, and of equals the earlier one. The null token's probability is 0 where
        there is no such token.
    """
    tokens = np.flatnonzero(in_context)
    considered = tokens if null is None else np.append(tokens, null)
    if considered.size == 0:
        return [], 0.0
    start, end = _log_softmax(start_logits, considered), _log_softmax(end_logits, considered)
    null_score = 0.0 if null is None else float(np.exp(start[null] + end[null]))
    longest = min(longest, tokens.size)
    if longest == 0:
        return [], null_score
    beyond = np.full(longest - 1, -np.inf)
    # Row i, column j: the span of j + 1 tokens that begins with the context's token i.
    ends = np.lib.stride_tricks.sliding_window_view(np.concatenate([end[tokens], beyond]), longest)
    scores = start[tokens][:, None] + ends
    best = np.argsort(-scores, axis=None, kind="stable")[:count]
    spans = [
        Span(float(np.exp(scores[row, more])), int(tokens[row]), int(tokens[row + more]))
        for row, more in zip(*np.unravel_index(best, scores.shape), strict=True)
        if scores[row, more] > -np.inf
    ]
    return spans, null_score


def _log_softmax(logits: Floats, considered: NDArray[np.intp]) -> NDArray[np.float64]:
    # Logarithms, because products of small probabilities become 0 and could no longer be told apart.
    wide = logits.astype(np.float64)
    highest = wide[considered].max()
    total: float = highest + np.log(np.exp(wide[considered] - highest).sum())
    return wide - total


def _characters(window: Window, span: Span, align_to_words: bool) -> tuple[int, int]:
    first, last = span.first, span.last
    if align_to_words and window.words[first] >= 0 and window.words[last] >= 0:
        # Words are numbered in each text anew.
        words = np.where(window.in_context, window.words, -1)
        first = int(np.flatnonzero(words == words[first])[0])
        last = int(np.flatnonzero(words == words[last])[-1])
    return int(window.offsets[first, 0]), int(window.offsets[last, 1])
