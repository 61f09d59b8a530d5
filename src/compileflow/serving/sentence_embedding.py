"""Sentence embeddings, pooled as the source model's configuration says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compileflow.contracts import Arrays
from compileflow.errors import InputError, LoadError
from compileflow.serving.embedding_recipe import checked_poolings, read_recipe
from compileflow.serving.padding import complete_inputs
from compileflow.serving.rows import PreparedItem, checked_batch_size, run_rows

Embeddings = NDArray[np.float32]

_SETTINGS = ("normalize", "batch_size", "pooling")
_TOKENS = "last_hidden_state"
# How many texts one call of the tokenizer takes: a call for each text would be several times slower.
_TOKENIZED_TEXTS = 1024
# Shorter embeddings are divided by this length: eps of torch.nn.functional.normalize.
_SHORTEST = 1e-12


def _weighted_mean(tokens: Embeddings) -> Embeddings:
    weights = np.arange(1, len(tokens) + 1, dtype=np.float32)
    return np.asarray(weights @ tokens / weights.sum())


# From the tokens of a text, shape (tokens, dimension), to shape (dimension,).
_POOL: Mapping[str, Callable[[Embeddings], Embeddings]] = {
    "mean": lambda tokens: tokens.mean(axis=0),
    "cls": lambda tokens: tokens[0],
    "max": lambda tokens: tokens.max(axis=0),
    "mean_sqrt_len_tokens": lambda tokens: tokens.sum(axis=0) / np.float32(np.sqrt(len(tokens))),
    "weightedmean": _weighted_mean,
    "lasttoken": lambda tokens: tokens[-1],
}


class SentenceEmbeddingPipeline:
    """Embeds texts as `encode` of sentence-transformers does: one embedding per text.

    Args:
        model: CompiledModel for feature-extraction.
        tokenizer: CompiledTokenizer of the model.
        folder: Folder of the artifact, with modules.json and the files named there if the source model has them.
        **settings: `normalize` (True or False) and `pooling` (a mode of `POOLINGS`) override modules.json;
            `batch_size` is the most texts per call of the component.

    Raises:
        LoadError: A setting is unknown, a module cannot be compiled, or the component does not return tokens.
    """

    task = "sentence-similarity"

    def __init__(self, model: Any, tokenizer: Any, folder: Path, **settings: Any):
        unknown_names = sorted(set(settings) - set(_SETTINGS))
        if unknown_names:
            raise LoadError(
                f"Sentence embeddings have no setting {unknown_names[0]!r}.",
                hint=f"The settings are: {', '.join(_SETTINGS)}.",
            )
        # Read here, so that loading fails for a model that cannot be pooled.
        recipe = read_recipe(folder)
        record = model.graph.record
        axes = {output.name: output.axes for output in record.outputs}
        if axes.get(_TOKENS, ())[:2] != ("batch", "sequence"):
            raise LoadError(
                f"Sentence embeddings pool {_TOKENS}, but the compiled model returns {', '.join(axes)}.",
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
        """Embed a text, a list of texts, or the texts of an iterator one at a time.

        Args:
            inputs: A text, a list or tuple of texts, or an iterator. Texts longer than `max_tokens` are truncated.
            batch_size: Most texts per call of the component. None: the pipeline's setting.
            normalize: Whether the embeddings are scaled to length 1. None: the pipeline's setting.

        Returns:
            float32 of shape (dimension,) for a text, or (texts, dimension) for a list, in its order. For an
            iterator, an iterator with one embedding per text.

        Raises:
            InputError: An input is not a text, or the tokenizer returns no token for it.
        """
        if isinstance(inputs, Iterator):
            return (self(text, normalize=normalize) for text in inputs)
        is_single = isinstance(inputs, str)
        texts = _checked_texts([inputs] if is_single else inputs)
        embeddings = np.empty((len(texts), self.dimension), dtype=np.float32)
        rows_per_call = checked_batch_size(batch_size) or self.batch_size
        pooled = run_rows(self.model, self._prepared(texts), self._pool, batch_size=rows_per_call)
        for index, embedding in enumerate(pooled):
            embeddings[index] = embedding
        if self.normalize if normalize is None else normalize:
            embeddings /= np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), _SHORTEST)
        return embeddings[0] if is_single else embeddings

    def _prepared(self, texts: Sequence[str]) -> Iterator[PreparedItem[None]]:
        record = self.model.graph.record
        for start in range(0, len(texts), _TOKENIZED_TEXTS):
            chunk = texts[start : start + _TOKENIZED_TEXTS]
            # Without the mask: it would be all ones, and `complete_inputs` adds it faster.
            encoded = self.tokenizer(
                [self._prompt + text for text in chunk],
                padding=False,
                truncation=True,
                max_length=self.max_tokens,
                return_attention_mask=False,
            )
            for index, text in enumerate(chunk):
                if not encoded["input_ids"][index]:
                    raise InputError(
                        f"The tokenizer returns no token for the text {text!r}.", hint="Leave it out."
                    )
                row = {name: np.array([values[index]]) for name, values in encoded.items()}
                yield PreparedItem([complete_inputs(record, row)], None)

    def _pool(self, _: None, row_outputs: list[Arrays]) -> Embeddings:
        tokens = row_outputs[0][_TOKENS][0]
        pooled = [_POOL[pooling](tokens) for pooling in self.poolings]
        return pooled[0] if len(pooled) == 1 else np.concatenate(pooled)

    def __repr__(self) -> str:
        return (
            f"SentenceEmbeddingPipeline(poolings={self.poolings}, normalize={self.normalize}, "
            f"dimension={self.dimension}, max_tokens={self.max_tokens})"
        )


def _checked_texts(inputs: Any) -> list[str]:
    if not isinstance(inputs, list | tuple):
        raise InputError(
            f"Expected a text or a list of texts, got {type(inputs).__name__}.",
            hint="Pass a str or a list of str.",
        )
    for position, text in enumerate(inputs):
        if not isinstance(text, str):
            raise InputError(
                f"Expected texts, got {type(text).__name__} at position {position} of the list.",
                hint="Pass a list of str.",
            )
    return list(inputs)


def _lowering(tokenizer: Any) -> Any:
    """Return a tokenizer that lowercases texts before it normalises them, but leaves special tokens unchanged."""
    from tokenizers.normalizers import Lowercase
    from tokenizers.normalizers import Sequence as Chain

    if not tokenizer.is_fast:
        raise LoadError(
            "The source model lowercases its texts, which needs a fast tokenizer.",
            hint="Save the source model with its tokenizer.json and compile it again.",
        )
    tokenizer_copy = deepcopy(tokenizer)
    normalizer = tokenizer_copy.backend_tokenizer.normalizer
    tokenizer_copy.backend_tokenizer.normalizer = (
        Lowercase() if normalizer is None else Chain([Lowercase(), normalizer])
    )
    return tokenizer_copy
