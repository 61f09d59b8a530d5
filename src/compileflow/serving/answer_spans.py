"""How the logits of an extractive question-answering model become answers: scored spans of the context."""

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

# Default number of tokens that neighbouring windows share, as in transformers 4.
_DOC_STRIDE = 128


@dataclass(frozen=True)
class AnswerSettings:
    """Settings of a call. Names and defaults are those of transformers 4, except for batch_size, which was 1.

    Attributes:
        top_k: Number of answers; with more than 1, each result is a list.
        doc_stride: Tokens of context that neighbouring windows share. None: half a window, at most 128.
        max_answer_len: Longest answer, in tokens.
        max_seq_len: Longest window, in tokens, including the question and special tokens. The length that the
            model was compiled for limits it further.
        max_question_len: Longest question, in tokens; longer questions are truncated.
        handle_impossible_answer: Whether "no answer" (an empty text) is a possible answer.
        align_to_words: Whether answers are extended to whole words.
        batch_size: Most windows per call of the model. None: see `run_rows`.
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
                is_valid, rule = isinstance(value, bool), "True or False"
            else:
                is_valid, rule = type(value) is int and value >= least, f"an integer of at least {least}"
            if not is_valid:
                raise InputError(
                    f"{field.name} must be {rule}, got {value!r}.",
                    hint=f"Leave it out for the default, {field.default}.",
                )

    def updated(self, changes: Mapping[str, Any]) -> AnswerSettings:
        """Return a copy with changed settings; a value of None leaves a setting unchanged.

        Raises:
            InputError: A setting is unknown, or its value is invalid.
        """
        names = [field.name for field in fields(self)]
        unknown_names = sorted(set(changes) - set(names))
        if unknown_names:
            raise InputError(
                f"Question answering has no setting {unknown_names[0]!r}.",
                hint=f"The settings are: {', '.join(names)}.",
            )
        return replace(self, **{name: value for name, value in changes.items() if value is not None})

    def shared_tokens(self, window_length: int) -> int:
        """Return how many tokens of context neighbouring windows share."""
        return min(window_length // 2, _DOC_STRIDE) if self.doc_stride is None else self.doc_stride


@dataclass(frozen=True)
class Window:
    """A question and one part of its context, encoded for the model.

    Attributes:
        inputs: Inputs of the component by name, each of shape (1, length), int64.
        in_context: Whether a token belongs to the context, shape (length,), bool.
        null: Index of the token that stands for an impossible answer; None if the tokenizer has none.
        offsets: Start and end of each token in its text, in characters, shape (length, 2); the end is exclusive.
        words: Number of the word that each token belongs to, or -1, shape (length,).
    """

    inputs: Arrays
    in_context: NDArray[np.bool_]
    null: int | None
    offsets: NDArray[np.int64]
    words: NDArray[np.int64]


@dataclass(frozen=True)
class Span:
    """A possible answer: tokens `first` to `last` of a window, both included, and their probability."""

    score: float
    first: int
    last: int


def best_answers(
    windows: Iterable[tuple[Window, Floats, Floats]], context: str, settings: AnswerSettings
) -> list[Answer]:
    """Choose the best answers of all windows of one context.

    Spans with the same text, ignoring case, are one answer at the position of the first span. Their scores are
    added, so a score can exceed 1. The score of "no answer" is the lowest that any window gives it.

    Args:
        windows: Windows with their start and end logits, each of shape (length,).
        context: Text that contains the answers.
        settings: Number and length of the answers, and which answers are allowed.

    Returns:
        At least one answer, the best first: {"score", "start", "end", "answer"}, with start and end in
        characters of the context. A context without tokens gives the empty answer.

    Source: the question-answering pipeline of transformers 4,
    https://huggingface.co/docs/transformers/v4.57.1/en/main_classes/pipelines
    """
    # More spans than answers, because several spans may become one answer when they are extended to words.
    count = 2 * settings.top_k + 10 if settings.align_to_words else settings.top_k
    answers: dict[str, Answer] = {}
    null_scores = []
    for window, start_logits, end_logits in windows:
        spans, null_score = best_spans(
            start_logits,
            end_logits,
            window.in_context,
            window.null,
            count=count,
            longest=settings.max_answer_len,
        )
        null_scores.append(null_score)
        # Question and context both number their words from 0.
        words = np.where(window.in_context & settings.align_to_words, window.words, -1)
        for span in spans:
            start, end = _characters(window, span, words)
            text = context[start:end]
            answer = answers.setdefault(text.lower(), {"score": 0.0, "start": start, "end": end, "answer": text})
            answer["score"] += span.score
    candidates = list(answers.values())
    if settings.handle_impossible_answer or not candidates:
        null_score = min(null_scores) if settings.handle_impossible_answer else 0.0
        candidates.append({"score": null_score, "start": 0, "end": 0, "answer": ""})
    return sorted(candidates, key=lambda answer: answer["score"], reverse=True)[: settings.top_k]


def best_spans(
    start_logits: Floats,
    end_logits: Floats,
    in_context: NDArray[np.bool_],
    null: int | None,
    *,
    count: int,
    longest: int,
) -> tuple[list[Span], float]:
    """Return the most probable spans of one window, and the probability that it contains no answer.

    The probability of a span is softmax(start_logits)[first] * softmax(end_logits)[last], with each softmax over
    the tokens of the context and the null token.

    Args:
        start_logits: Start logits, shape (length,).
        end_logits: End logits, shape (length,).
        in_context: Tokens that an answer may contain, shape (length,); they are contiguous.
        null: Index of the null token, which is never part of a span.
        count: Most spans to return.
        longest: Maximum tokens per span; > 0.

    Returns:
        Spans, the most probable first; the earlier of two equal spans comes first. Without a null token, its
        probability is 0.
    """
    tokens = np.flatnonzero(in_context)
    candidates = tokens if null is None else np.append(tokens, null)
    if candidates.size == 0:
        return [], 0.0
    start, end = _log_softmax(start_logits, candidates), _log_softmax(end_logits, candidates)
    null_score = 0.0 if null is None else float(np.exp(start[null] + end[null]))
    longest = min(longest, tokens.size)
    if longest == 0:
        return [], null_score
    padding = np.full(longest - 1, -np.inf)
    # Row i, column j: the span of j + 1 tokens that begins with token i of the context.
    ends = np.lib.stride_tricks.sliding_window_view(np.concatenate([end[tokens], padding]), longest)
    scores = start[tokens][:, None] + ends
    top_indices = np.argsort(-scores, axis=None, kind="stable")[:count]
    spans = [
        Span(float(np.exp(scores[row, column])), int(tokens[row]), int(tokens[row + column]))
        for row, column in zip(*np.unravel_index(top_indices, scores.shape), strict=True)
        if scores[row, column] > -np.inf
    ]
    return spans, null_score


def _log_softmax(logits: Floats, candidates: NDArray[np.intp]) -> NDArray[np.float64]:
    # Logarithms, because products of small probabilities underflow to 0 and would compare as equal.
    values = logits.astype(np.float64)
    highest = values[candidates].max()
    total: float = highest + np.log(np.exp(values[candidates] - highest).sum())
    return values - total


def _characters(window: Window, span: Span, words: NDArray[np.int64]) -> tuple[int, int]:
    """Return start and end of a span in the context, extended to whole words unless `words` is -1."""
    first, last = span.first, span.last
    if words[first] >= 0 and words[last] >= 0:
        first = int(np.flatnonzero(words == words[first])[0])
        last = int(np.flatnonzero(words == words[last])[-1])
    return int(window.offsets[first, 0]), int(window.offsets[last, 1])
