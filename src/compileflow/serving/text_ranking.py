"""Scores of pairs of texts, and documents ordered by them, as CrossEncoder of sentence-transformers gives them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compileflow.contracts import Arrays
from compileflow.errors import InputError, LoadError
from compileflow.serving.rows import PreparedItem, checked_batch_size, run_rows
from compileflow.serving.tokenized_rows import lowering_tokenizer, tokenized_rows
from compileflow.source_model.activations import Activation, in_torch, softmax
from compileflow.source_model.ranking_recipe import read_ranking_recipe
from compileflow.spec import HfTask

_LOGITS = "logits"
ScoreFunction = Callable[[Any], Any]


class TextRankingPipeline:
    """Scores pairs of texts, such as a query and a document, with a cross-encoder.

    Args:
        model: CompiledModel for text-ranking or text-classification.
        tokenizer: CompiledTokenizer of the model.
        folder: Folder of the artifact, with the files of sentence-transformers if the source model has them.
        **settings: `activation_fn` (a function of a tensor of logits) overrides the source model's files;
            `batch_size` is the most pairs per call of the component.

    Attributes:
        max_tokens: Longest pair in tokens; longer ones are truncated.
        prompts: Texts that a call may put in front of the first text of every pair, by name.
        default_prompt_name: Name of the prompt of a call that gives none; None for no prompt.
        num_labels: Number of scores of a pair.

    Raises:
        LoadError: A setting is unknown, or a file of sentence-transformers is not supported.
    """

    load_settings = ("activation_fn", "batch_size")

    def __init__(self, model: Any, tokenizer: Any, folder: Path, **settings: Any):
        unknown_names = sorted(set(settings) - set(self.load_settings))
        if unknown_names:
            raise LoadError(
                f"Text ranking has no setting {unknown_names[0]!r}.",
                hint=f"The settings are: {', '.join(self.load_settings)}.",
            )
        recipe = read_ranking_recipe(folder)
        longest = model.graph.record.max_sequence_length
        self.model, self.tokenizer = model, tokenizer
        self.task = HfTask.TEXT_RANKING.value
        self.activation_fn: ScoreFunction = settings.get("activation_fn") or recipe.activation
        self.batch_size = checked_batch_size(settings.get("batch_size"))
        self.max_tokens = min(recipe.text.max_tokens or longest, longest)
        self.prompts, self.default_prompt_name = recipe.text.prompts, recipe.text.default_prompt_name
        self.num_labels = int(model.config.num_labels)
        self._text = recipe.text
        if recipe.text.lower_case:
            self.tokenizer = lowering_tokenizer(tokenizer)

    def __call__(
        self,
        inputs: Any,
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        batch_size: int | None = None,
        activation_fn: ScoreFunction | None = None,
        apply_softmax: bool = False,
    ) -> Any:
        """Score a pair, a list of pairs, or the pairs of an iterator one at a time.

        Args:
            inputs: A pair of texts as a list or tuple, a list of pairs, or an iterator of pairs.
            prompt: Text in front of the first text of every pair. It takes precedence over `prompt_name`.
            prompt_name: Name of one of the model's prompts. None: the model's default.
            batch_size: Most pairs per call of the component. None: the pipeline's setting.
            activation_fn: Function from logits to scores, such as torch.nn.Identity(). None: the model's.
            apply_softmax: Whether several scores of a pair are scaled to a sum of 1.

        Returns:
            float32: for a pair a number, or shape (labels,) if the model has several labels; for a list shape
            (pairs,) or (pairs, labels), in its order; for an iterator, an iterator with the score of each pair.

        Raises:
            InputError: An input is not a pair of texts, or the model does not have the prompt.
        """
        if isinstance(inputs, Iterator):
            prompts: dict[str, Any] = {"prompt": prompt, "prompt_name": prompt_name}
            return (
                self(pair, activation_fn=activation_fn, apply_softmax=apply_softmax, **prompts) for pair in inputs
            )
        is_single = _is_pair(inputs)
        pairs = _checked_pairs([inputs] if is_single else inputs)
        rows_per_call = checked_batch_size(batch_size) or self.batch_size
        items = self._prepared(pairs, self._text.prompt(prompt, prompt_name))
        logits = np.empty((len(pairs), self.num_labels), np.float32)
        for index, row in enumerate(run_rows(self.model, items, _logits, batch_size=rows_per_call)):
            logits[index] = row
        scores = self._scores(logits, activation_fn or self.activation_fn, apply_softmax=apply_softmax)
        return scores[0] if is_single else scores

    predict = __call__

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        return_documents: bool = False,
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        batch_size: int | None = None,
        activation_fn: ScoreFunction | None = None,
    ) -> list[dict[str, Any]]:
        """Score documents for a query, and return them with the best first.

        Args:
            query: First text of every pair.
            documents: Second texts.
            top_k: Most results. None: all.
            return_documents: Whether each result contains its document.
            prompt: Text in front of the query. It takes precedence over `prompt_name`.
            prompt_name: Name of one of the model's prompts. None: the model's default.
            batch_size: Most pairs per call of the component. None: the pipeline's setting.
            activation_fn: Function from logits to scores. None: the model's.

        Returns:
            {"corpus_id", "score"} for each document, with its position in `documents`, and "text" if requested.

        Raises:
            InputError: The model has several labels, or a text is not a str.
        """
        if self.num_labels != 1:
            raise InputError(
                f"rank needs a model with one label, this one has {self.num_labels}.",
                hint="Call the pipeline with pairs, and choose a label.",
            )
        scores = self(
            [(query, document) for document in documents],
            prompt=prompt,
            prompt_name=prompt_name,
            batch_size=batch_size,
            activation_fn=activation_fn,
        )
        results: list[dict[str, Any]] = [
            {"corpus_id": number, "score": score} for number, score in enumerate(scores.tolist())
        ]
        if return_documents:
            for result in results:
                result["text"] = documents[result["corpus_id"]]
        return sorted(results, key=lambda result: result["score"], reverse=True)[:top_k]

    def _prepared(self, pairs: Sequence[tuple[str, str]], prompt: str) -> Iterator[PreparedItem[None]]:
        first_texts, second_texts = [prompt + first for first, _ in pairs], [second for _, second in pairs]
        rows = tokenized_rows(self.model, self.tokenizer, first_texts, second_texts, max_tokens=self.max_tokens)
        return (PreparedItem([row], None) for row in rows)

    def _scores(self, logits: Any, activation_fn: ScoreFunction, *, apply_softmax: bool) -> Any:
        is_own = isinstance(activation_fn, Activation)
        scores = activation_fn(logits) if is_own else in_torch(activation_fn, logits)
        if self.num_labels == 1 and scores.ndim > 1:
            scores = scores.squeeze(-1)
        return softmax(scores) if apply_softmax and scores.ndim > 1 else scores

    def __repr__(self) -> str:
        return f"TextRankingPipeline(activation_fn={self.activation_fn}, max_tokens={self.max_tokens})"


def _logits(_: None, row_outputs: list[Arrays]) -> Any:
    return row_outputs[0][_LOGITS][0]


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and not isinstance(value[0], list | tuple)


def _checked_pairs(inputs: Any) -> list[tuple[str, str]]:
    if not isinstance(inputs, list | tuple):
        raise InputError(
            f"Expected a pair of texts or a list of pairs, got {type(inputs).__name__}.",
            hint='Pass ("query", "document"), or a list of such pairs.',
        )
    for position, pair in enumerate(inputs):
        is_pair = isinstance(pair, list | tuple) and len(pair) == 2
        if not (is_pair and all(isinstance(text, str) for text in pair)):
            raise InputError(
                f"Expected pairs of texts, got {pair!r:.80} at position {position} of the list.",
                hint='Pass ("query", "document"), or a list of such pairs.',
            )
    return [(first, second) for first, second in inputs]
