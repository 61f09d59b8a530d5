"""Extractive question answering with the interface of transformers 4's pipeline, which transformers 5 dropped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np

from compileflow.contracts import Arrays
from compileflow.errors import InputError, LoadError
from compileflow.serving.answer_spans import AnswerSettings, Window, best_answers
from compileflow.serving.padding import complete_inputs
from compileflow.serving.rows import PreparedItem, run_rows
from compileflow.spec import HfTask


class QuestionAnsweringPipeline:
    """Answers a question with a span of a context.

    A context that is too long for the model is split into overlapping windows; the best span of all windows wins.

    Attributes:
        model: CompiledModel for question answering.
        tokenizer: Tokenizer of the model. With padding on the left, the context comes first, as in transformers 4.
        task: "question-answering".
        settings: Default settings of each call.
    """

    load_settings = tuple(field.name for field in fields(AnswerSettings))
    call_settings = ("inputs", "question", "context", *load_settings)

    def __init__(self, model: Any, tokenizer: Any, **settings: Any):
        self.model, self.tokenizer = model, tokenizer
        self.task = HfTask.QUESTION_ANSWERING.value
        self.settings = AnswerSettings().updated(settings)
        if not tokenizer.is_fast:
            raise LoadError(
                "Question answering needs to know where in the text each token is; this tokenizer cannot tell.",
                hint="Save the source model with a fast tokenizer and compile it again.",
            )

    def __call__(self, inputs: Any = None, *, question: Any = None, context: Any = None, **settings: Any) -> Any:
        """Answer questions.

        Args:
            inputs: A dict with "question" and "context", an object with these attributes, a list of these, or an
                iterator of these, which yields one answer at a time.
            question: A text or a list of texts, instead of `inputs`.
            context: A text. For a list of questions, one text for all of them or a list of the same length.
            **settings: Settings of `AnswerSettings`, which override those of the constructor.

        Returns:
            {"score", "start", "end", "answer"}, or with top_k > 1 a list of these, the best first; start and end
            are character positions in the context. Several questions return a list of such results. A single
            question returns its result, even if it was passed in a list.

        Raises:
            InputError: A question or context is missing or empty, a setting is invalid, or a question leaves no
                room for its context.
        """
        call_settings = self.settings.updated(settings)
        if isinstance(inputs, Iterator):
            return (self(example, **settings) for example in inputs)
        items = (self._prepared(*example, call_settings) for example in read_examples(inputs, question, context))
        answer = partial(_answer, call_settings)
        results = list(run_rows(self.model, items, answer, batch_size=call_settings.batch_size))
        return results[0] if len(results) == 1 else results

    def _prepared(
        self, question: str, context: str, settings: AnswerSettings
    ) -> PreparedItem[tuple[str, list[Window]]]:
        windows = self._windows(question, context, settings)
        return PreparedItem([window.inputs for window in windows], (context, windows))

    def _windows(self, question: str, context: str, settings: AnswerSettings) -> list[Window]:
        limit = min(settings.max_seq_len, self.model.graph.record.max_sequence_length)
        question, question_length = self._cut(question, settings.max_question_len)
        room = limit - question_length - self.tokenizer.num_special_tokens_to_add(pair=True)
        if room < 1:
            raise InputError(
                f"The question has {question_length} tokens and leaves no room for the context in a window of "
                f"{limit} tokens.",
                hint="Ask a shorter question, lower max_question_len, or compile for longer sequences.",
            )
        overlap = settings.shared_tokens(limit)
        question_first = self.tokenizer.padding_side == "right"
        encoded = self.tokenizer(
            *((question, context) if question_first else (context, question)),
            padding=False,
            truncation="only_second" if question_first else "only_first",
            max_length=limit,
            stride=overlap if overlap < room else room // 2,
            return_attention_mask=True,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        count = len(encoded["input_ids"])
        if count > 1 and settings.doc_stride is not None and overlap >= room:
            raise InputError(
                f"doc_stride is {overlap} tokens, but a window has room for only {room} tokens of the context.",
                hint="Lower doc_stride, or leave it out.",
            )
        return [self._window(encoded, index, context_sequence=int(question_first)) for index in range(count)]

    def _cut(self, question: str, longest: int) -> tuple[str, int]:
        """Return the question, cut to `longest` tokens, and its number of tokens."""
        settings = {"add_special_tokens": False, "padding": False, "truncation": False, "max_length": None}
        encoded = self.tokenizer(question, return_offsets_mapping=True, verbose=False, **settings)
        if len(encoded["input_ids"]) > longest:
            question = question[: encoded["offset_mapping"][longest - 1][1]]
            encoded = self.tokenizer(question, **settings)
        return question, len(encoded["input_ids"])

    def _window(self, encoded: Any, index: int, *, context_sequence: int) -> Window:
        sequences = encoded.sequence_ids(index)
        ids = encoded["input_ids"][index]
        # A question or context may contain the token as text; only the one that the tokenizer adds counts.
        nulls = [
            position
            for position, (token, sequence) in enumerate(zip(ids, sequences, strict=True))
            if sequence is None and token == self.tokenizer.cls_token_id
        ]
        # Some tokenizers return token types that their model does not have.
        record = self.model.graph.record
        names = [tensor.name for tensor in record.inputs if tensor.name in encoded]
        return Window(
            inputs=complete_inputs(record, {name: [encoded[name][index]] for name in names}),
            in_context=np.array([sequence == context_sequence for sequence in sequences]),
            null=nulls[0] if nulls else None,
            offsets=np.asarray(encoded["offset_mapping"][index], dtype=np.int64),
            words=np.array([-1 if word is None else word for word in encoded.word_ids(index)], dtype=np.int64),
        )


def _answer(settings: AnswerSettings, details: tuple[str, list[Window]], row_outputs: list[Arrays]) -> Any:
    context, windows = details
    logits = [
        (window, outputs["start_logits"][0], outputs["end_logits"][0])
        for window, outputs in zip(windows, row_outputs, strict=True)
    ]
    answers = best_answers(logits, context, settings)
    return answers if settings.top_k > 1 else answers[0]


def read_examples(inputs: Any, question: Any, context: Any) -> list[tuple[str, str]]:
    """Return (question, context) pairs from any of the supported forms.

    Raises:
        InputError: A text is missing, empty or not a string, or the lists differ in length.
    """
    if inputs is None:
        inputs = _paired(question, context)
    elif question is not None or context is not None:
        raise InputError("Examples were passed twice.", hint="Pass either inputs, or question and context.")
    if isinstance(inputs, Mapping) or hasattr(inputs, "question"):
        inputs = [inputs]
    if isinstance(inputs, str) or not isinstance(inputs, Iterable):
        raise InputError(
            f"Question answering cannot read an input of type {type(inputs).__name__}.",
            hint='Pass question=... and context=..., or {"question": ..., "context": ...}, or a list of these.',
        )
    return [(_text(example, "question"), _text(example, "context")) for example in inputs]


def _paired(question: Any, context: Any) -> list[dict[str, Any]]:
    if not isinstance(question, list | tuple):
        return [{"question": question, "context": context}]
    contexts = context if isinstance(context, list | tuple) else [context] * len(question)
    if len(contexts) != len(question):
        raise InputError(
            f"Got {len(question)} questions and {len(contexts)} contexts.",
            hint="Pass as many contexts as questions, or one context for all.",
        )
    return [{"question": text, "context": passage} for text, passage in zip(question, contexts, strict=True)]


def _text(example: Any, name: str) -> str:
    text = example.get(name) if isinstance(example, Mapping) else getattr(example, name, None)
    if not isinstance(text, str) or not text:
        problem = (
            "an empty text" if text == "" else "missing" if text is None else f"of type {type(text).__name__}"
        )
        raise InputError(f"The {name} is {problem}.", hint=f"Pass a {name} of at least one character.")
    return text
