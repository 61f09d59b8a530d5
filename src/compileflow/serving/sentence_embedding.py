"""Sentence embeddings, pooled as the source model's own configuration says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compileflow.contracts import Arrays
from compileflow.errors import InputError, LoadError
from compileflow.serving.batches import checked_batch_size, may_pad, plan_batches, stack_rows
from compileflow.serving.embedding_recipe import checked_poolings, read_recipe
from compileflow.serving.padding import complete_inputs

Embeddings = NDArray[np.float32]

_SETTINGS = ("normalize", "batch_size", "pooling")
_TOKENS = "last_hidden_state"
# How many texts are tokenized and sorted at a time.
_WINDOW_TEXTS = 1024
# Lengths below this count as this: torch.nn.functional.normalize's eps.
_SHORTEST = 1e-12


def _weighted_mean(tokens: Embeddings) -> Embeddings:
    weights = np.arange(1, len(tokens) + 1, dtype=np.float32)
    return np.asarray(weights @ tokens / weights.sum())


# Each takes a text's tokens, shape (tokens, dimension), and gives shape (dimension,).
_POOL: Mapping[str, Callable[[Embeddings], Embeddings]] = {
    "mean": lambda tokens: tokens.mean(axis=0),
    "cls": lambda tokens: tokens[0],
    "max": lambda tokens: tokens.max(axis=0),
    "mean_sqrt_len_tokens": lambda tokens: tokens.sum(axis=0) / np.float32(np.sqrt(len(tokens))),
    "weightedmean": _weighted_mean,
    "lasttoken": lambda tokens: tokens[-1],
}


class SentenceEmbeddingPipeline:
    """Call it with texts; the answer is one embedding a text, as sentence-transformers' `encode` gives it.

    Args:
        model: CompiledModel for feature-extraction.
        tokenizer: CompiledTokenizer.
        folder: The artifact's, with modules.json and what it names, if the source model has them.
        **settings: normalize: None as modules.json says, or True or False; pooling: None as modules.json says,
            or a way of pooling; batch_size: most texts a call of the graph.

    Raises:
        LoadError: an unknown setting, a module that is not compiled, or a graph that gives no tokens.
    """

    task = "sentence-similarity"

    def __init__(self, model: Any, tokenizer: Any, folder: Path, **settings: Any):
        unknown = sorted(set(settings) - set(_SETTINGS))
        if unknown:
            raise LoadError(
                f"Sentence embeddings have no setting {unknown[0]!r}.", hint=f"There are: {', '.join(_SETTINGS)}."
            )
        # Read here, so that a model that cannot be pooled is refused when it is loaded.
        recipe = read_recipe(folder)
        record = model.graph.record
        axes = {output.name: output.axes for output in record.outputs}
        if axes.get(_TOKENS, ())[:2] != ("batch", "sequence"):
            raise LoadError(
                f"The graph gives {', '.join(axes)} and no {_TOKENS} to pool.",
                hint="Compile the model for feature-extraction.",
            )
        normalize, pooling = settings.get("normalize"), settings.get("pooling")
        self.model, self.tokenizer = model, tokenizer
        self.normalize: bool = recipe.normalize if normalize is None else bool(normalize)
        self.poolings = recipe.poolings if pooling is None else checked_poolings((pooling,), "pooling")
        self.batch_size = checked_batch_size(settings.get("batch_size"))
        self.max_tokens = min(recipe.max_tokens or record.max_sequence_length, record.max_sequence_length)
        self.dimension = int(axes[_TOKENS][-1]) * len(self.poolings)
        self._prompt = recipe.prompt
        if recipe.lower_case:
            self.tokenizer = _lowering(tokenizer)

    def __call__(
        self,
        inputs: str | Sequence[str] | Iterator[str],
        *,
        batch_size: int | None = None,
        normalize: bool | None = None,
    ) -> Any:
        """Embed a text, a list of texts, or one after the other those of an iterator.

        Args:
            inputs: A text, a list or tuple of texts, or an iterator; what is longer than `max_tokens` is cut.
            batch_size: Most texts a call of the graph; None as the pipeline was given.
            normalize: Whether the embeddings get length 1; None as the pipeline was given.

        Returns:
            float32, shape (dimension,) for one text, (texts, dimension) for a list, in its order; for an iterator
            another, of one embedding a text.

        Raises:
            InputError: an input that is no text, or a text that the tokenizer makes no token of.
        """
        if isinstance(inputs, Iterator):
            return (self(one, normalize=normalize) for one in inputs)
        single = isinstance(inputs, str)
        texts = _checked_texts([inputs] if single else inputs)
        most = checked_batch_size(batch_size) or self.batch_size
        found = np.empty((len(texts), self.dimension), dtype=np.float32)
        for start in range(0, len(texts), _WINDOW_TEXTS):
            window = texts[start : start + _WINDOW_TEXTS]
            self._embed(window, most, found[start : start + len(window)])
        if self.normalize if normalize is None else normalize:
            found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), _SHORTEST)
        return found[0] if single else found

    def _embed(self, texts: Sequence[str], batch_size: int | None, into: Embeddings) -> None:
        graph, record = self.model.graph, self.model.graph.record
        rows = self._rows(texts)
        pad = may_pad(record, self.model.config)
        for batch in plan_batches(record, rows, batch_size=batch_size, pad=pad):
            answer = graph.run(stack_rows(record, [rows[index] for index in batch]))
            for place, index in enumerate(batch):
                own = answer[_TOKENS][place, : rows[index]["input_ids"].shape[1]]
                into[index] = np.concatenate([_POOL[pooling](own) for pooling in self.poolings])

    def _rows(self, texts: Sequence[str]) -> list[Arrays]:
        encoded = self.tokenizer(
            [self._prompt + text for text in texts], padding=False, truncation=True, max_length=self.max_tokens
        )
        record = self.model.graph.record
        rows = []
        for index, text in enumerate(texts):
            if not encoded["input_ids"][index]:
                raise InputError(f"The tokenizer makes no token of the text {text!r}.", hint="Leave it out.")
            row = {name: np.array([values[index]]) for name, values in encoded.items()}
            rows.append(complete_inputs(record, row))
        return rows

    def __repr__(self) -> str:
        return (
            f"SentenceEmbeddingPipeline(poolings={self.poolings}, normalize={self.normalize}, "
            f"dimension={self.dimension}, max_tokens={self.max_tokens})"
        )


def _checked_texts(inputs: Any) -> list[str]:
    if not isinstance(inputs, list | tuple):
        raise InputError(
            f"Embedded are texts; found a {type(inputs).__name__}.", hint="Give a str or a list of them."
        )
    for position, text in enumerate(inputs):
        if not isinstance(text, str):
            raise InputError(
                f"Entry {position} of the list is a {type(text).__name__}, not a text.", hint="Give a list of str."
            )
    return list(inputs)


def _lowering(tokenizer: Any) -> Any:
    """Return a tokenizer that lowers texts before its own normalisation and leaves special tokens as they are."""
    from tokenizers.normalizers import Lowercase
    from tokenizers.normalizers import Sequence as Chain

    if not tokenizer.is_fast:
        raise LoadError(
            "The model lowers its texts, and its tokenizer is no fast one.",
            hint="Save the model with its tokenizer.json.",
        )
    own = deepcopy(tokenizer)
    before = own.backend_tokenizer.normalizer
    own.backend_tokenizer.normalizer = Lowercase() if before is None else Chain([Lowercase(), before])
    return own
