"""Extractive question answering as transformers 4's pipeline gave it; transformers 5 has none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from compileflow.errors import InputError, LoadError
from compileflow.serving.answer_spans import AnswerSettings, Floats, Window, best_answers
from compileflow.serving.batches import may_pad, plan_batches, split_row, stack_rows
from compileflow.serving.padding import complete_inputs
from compileflow.spec import HfTask

# How many questions are tokenized and sorted at a time.
_EXAMPLES = 256


class QuestionAnsweringPipeline:
    """Call it with a question and a context; the answer is a span of the context.

    A context that is too long for the model is read in windows that overlap, and the best span of all wins.

    Attributes:
        model: The compiled model.
        tokenizer: Its tokenizer. Padding on the left means, as in transformers 4, that the context comes first.
        task: "question-answering".
        settings: Defaults of each call.
    """

    def __init__(self, model: Any, tokenizer: Any, **settings: Any):
        self.model, self.tokenizer = model, tokenizer
        self.task = HfTask.QUESTION_ANSWERING.value
        self.settings = AnswerSettings().updated(settings)
        if not tokenizer.is_fast:
            raise LoadError(
                "The tokenizer does not say where in the text a token comes from, which an answer is cut by.",
                hint="Save the source model with a fast tokenizer, and compile it again.",
            )

    def __call__(self, inputs: Any = None, *, question: Any = None, context: Any = None, **settings: Any) -> Any:
        """Answer questions.

        Args:
            inputs: A dict with "question" and "context", an object with these attributes, a list of such, or
                an iterator of such, which is answered one by one as the answers are asked for.
            question: Instead of `inputs`: a text, or a list of texts.
            context: A text; with a list of questions, either one text for all or a list as long.
            **settings: See `AnswerSettings`; what the call itself gives wins over the constructor's.

        Returns:
            {"score", "start", "end", "answer"}, or with top_k > 1 a list of such, the best first; start and end
            are character positions in the context. Several questions give a list of these, one question its own
            result, in a list or not.

        Raises:
            InputError: a question or context is missing or empty, a setting is wrong, or a question leaves a
                context no room.
        """
        chosen = self.settings.updated(settings)
        if isinstance(inputs, Iterator):
            return (self(one, **settings) for one in inputs)
        examples = read_examples(inputs, question, context)
        results: list[Any] = []
        for start in range(0, len(examples), _EXAMPLES):
            results += self._answered(examples[start : start + _EXAMPLES], chosen)
        return results[0] if len(results) == 1 else results

    def _answered(self, examples: Sequence[tuple[str, str]], chosen: AnswerSettings) -> Iterator[Any]:
        windows = [self._windows(question, context, chosen) for question, context in examples]
        logits = iter(self._run([window for own in windows for window in own], chosen.batch_size))
        for (_, context), own in zip(examples, windows, strict=True):
            answers = best_answers([(window, *next(logits)) for window in own], context, chosen)
            yield answers if chosen.top_k > 1 else answers[0]

    def _windows(self, question: str, context: str, chosen: AnswerSettings) -> list[Window]:
        limit = min(chosen.max_seq_len, self.model.graph.record.max_sequence_length)
        question, taken = self._cut(question, chosen.max_question_len)
        room = limit - taken - self.tokenizer.num_special_tokens_to_add(pair=True)
        if room < 1:
            raise InputError(
                f"The question has {taken} tokens, which leaves the context none of the {limit} of a window.",
                hint="Ask a shorter question, lower max_question_len, or compile for longer sequences.",
            )
        shared = chosen.shared_tokens(limit)
        question_first = self.tokenizer.padding_side == "right"
        encoded = self.tokenizer(
            *((question, context) if question_first else (context, question)),
            padding=False,
            truncation="only_second" if question_first else "only_first",
            max_length=limit,
            stride=shared if shared < room else room // 2,
            return_attention_mask=True,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        count = len(encoded["input_ids"])
        if count > 1 and chosen.doc_stride is not None and shared >= room:
            raise InputError(
                f"doc_stride is {shared} tokens, and next to its question a window holds {room} of the context.",
                hint="Lower doc_stride, or leave it out.",
            )
        return [self._window(encoded, index, context_sequence=int(question_first)) for index in range(count)]

    def _cut(self, question: str, longest: int) -> tuple[str, int]:
        """Return the question, cut to so many tokens, and how many it has."""
        settings = {"add_special_tokens": False, "padding": False, "truncation": False, "max_length": None}
        encoded = self.tokenizer(question, return_offsets_mapping=True, verbose=False, **settings)
        if len(encoded["input_ids"]) > longest:
            question = question[: encoded["offset_mapping"][longest - 1][1]]
            encoded = self.tokenizer(question, **settings)
        return question, len(encoded["input_ids"])

    def _window(self, encoded: Any, index: int, *, context_sequence: int) -> Window:
        sequences = encoded.sequence_ids(index)
        ids = encoded["input_ids"][index]
        # A question or context may spell the token out; only the one that the tokenizer adds counts.
        nulls = [
            place
            for place, (token, sequence) in enumerate(zip(ids, sequences, strict=True))
            if sequence is None and token == self.tokenizer.cls_token_id
        ]
        # Some tokenizers give token types that their model has not.
        record = self.model.graph.record
        names = [tensor.name for tensor in record.inputs if tensor.name in encoded]
        return Window(
            inputs=complete_inputs(record, {name: [encoded[name][index]] for name in names}),
            in_context=np.array([sequence == context_sequence for sequence in sequences]),
            null=nulls[0] if nulls else None,
            offsets=np.asarray(encoded["offset_mapping"][index], dtype=np.int64),
            words=np.array([-1 if word is None else word for word in encoded.word_ids(index)], dtype=np.int64),
        )

    def _run(self, windows: Sequence[Window], batch_size: int | None) -> list[tuple[Floats, Floats]]:
        """Return each window's start and end logits, each of shape (length,)."""
        graph, record = self.model.graph, self.model.graph.record
        rows = [window.inputs for window in windows]
        pad = may_pad(record, self.model.config)
        logits: dict[int, tuple[Floats, Floats]] = {}
        for batch in plan_batches(record, rows, batch_size=batch_size, pad=pad):
            answer = graph.run(stack_rows(record, [rows[index] for index in batch]))
            for place, index in enumerate(batch):
                cut = split_row(record, answer, place, rows[index])
                logits[index] = cut["start_logits"][0], cut["end_logits"][0]
        return [logits[index] for index in range(len(windows))]


def read_examples(inputs: Any, question: Any, context: Any) -> list[tuple[str, str]]:
    """Return (question, context) pairs from whatever form they were given in.

    Raises:
        InputError: something is missing, empty or no text, or the lists differ in length.
    """
    if inputs is None:
        inputs = _paired(question, context)
    elif question is not None or context is not None:
        raise InputError("Examples were given twice.", hint="Give either inputs, or question and context.")
    if isinstance(inputs, Mapping) or hasattr(inputs, "question"):
        inputs = [inputs]
    if isinstance(inputs, str) or not isinstance(inputs, Iterable):
        raise InputError(
            f"Question answering was called with {type(inputs).__name__}.",
            hint='Give question=... and context=..., or {"question": ..., "context": ...}, or a list of these.',
        )
    return [(_text(example, "question"), _text(example, "context")) for example in inputs]


def _paired(question: Any, context: Any) -> list[dict[str, Any]]:
    if not isinstance(question, list | tuple):
        return [{"question": question, "context": context}]
    contexts = context if isinstance(context, list | tuple) else [context] * len(question)
    if len(contexts) != len(question):
        raise InputError(
            f"There are {len(question)} questions and {len(contexts)} contexts.",
            hint="Give as many of each, or one context for all.",
        )
    return [{"question": one, "context": other} for one, other in zip(question, contexts, strict=True)]


def _text(example: Any, name: str) -> str:
    text = example.get(name) if isinstance(example, Mapping) else getattr(example, name, None)
    if not isinstance(text, str) or not text:
        found = "an empty text" if text == "" else "missing" if text is None else f"of type {type(text).__name__}"
        raise InputError(f"The {name} is {found}.", hint=f"Give a {name} of at least one character.")
    return text
