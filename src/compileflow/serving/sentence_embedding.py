"""Sentence embeddings, pooled as the source model's configuration says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compileflow.contracts import Arrays
from compileflow.errors import InputError, LoadError
from compileflow.serving.rows import PreparedItem, checked_batch_size, run_item, run_rows
from compileflow.serving.tokenized_rows import lowering_tokenizer, tokenized_rows
from compileflow.source_model.sentence_modules import EmbeddingRecipe, read_recipe, unit_length

Embeddings = NDArray[np.float32]

_TOKENS = "last_hidden_state"


class SentenceEmbeddingPipeline:
    """Embeds texts as `encode` of sentence-transformers does: one embedding per text.

    Args:
        model: CompiledModel for feature-extraction.
        tokenizer: CompiledTokenizer of the model.
        folder: Folder of the artifact, with modules.json and the files named there if the source model has them.
        **settings: `normalize` (True or False), `pooling` (a mode of `POOLINGS`) and `truncate_dim` (the size of
            embeddings) override the source model's files; `batch_size` is the most texts per call.

    Attributes:
        dimension: Size of an embedding.
        max_tokens: Longest text in tokens; longer ones are truncated.
        prompts: Texts that a call may put in front of every text, by name.
        default_prompt_name: Name of the prompt of a call that gives none; None for no prompt.
        similarity_fn_name: Function that the model's authors compare embeddings with, such as cosine or dot.
        truncate_dim: Size that embeddings are cut to; None keeps all numbers.

    Raises:
        LoadError: A setting is unknown, a module cannot be served, or the component does not return tokens.
    """

    task = "sentence-similarity"
    load_settings = ("normalize", "batch_size", "pooling", "truncate_dim")

    def __init__(self, model: Any, tokenizer: Any, folder: Path, **settings: Any):
        unknown_names = sorted(set(settings) - set(self.load_settings))
        if unknown_names:
            raise LoadError(
                f"Sentence embeddings have no setting {unknown_names[0]!r}.",
                hint=f"The settings are: {', '.join(self.load_settings)}.",
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
        if settings.get("pooling") is not None:
            recipe = recipe.with_pooling(settings["pooling"])
        self.model, self.tokenizer = model, tokenizer
        self.normalize: bool | None = settings.get("normalize")
        self.batch_size = checked_batch_size(settings.get("batch_size"))
        self.max_tokens = min(recipe.text.max_tokens or record.max_sequence_length, record.max_sequence_length)
        self.prompts, self.default_prompt_name = recipe.text.prompts, recipe.text.default_prompt_name
        self.similarity_fn_name = recipe.similarity_fn_name
        self._recipe, self._unscaled = recipe, recipe.without_normalize()
        self._size = _embedding_size(recipe, int(axes[_TOKENS][-1]))
        self.truncate_dim = _checked_size(settings.get("truncate_dim"), recipe.truncate_dim)
        self.dimension = min(self._size, self.truncate_dim or self._size)
        if recipe.text.lower_case:
            self.tokenizer = lowering_tokenizer(tokenizer)

    def __call__(
        self,
        inputs: str | Sequence[str] | Iterator[str],
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        batch_size: int | None = None,
        normalize: bool | None = None,
        truncate_dim: int | None = None,
    ) -> Any:
        """Embed a text, a list of texts, or the texts of an iterator one at a time.

        Args:
            inputs: A text, a list or tuple of texts, or an iterator. Texts longer than `max_tokens` are truncated.
            prompt: Text in front of every text. It takes precedence over `prompt_name`.
            prompt_name: Name of one of the model's prompts. None: the model's default.
            batch_size: Most texts per call of the component. None: the pipeline's setting.
            normalize: Whether the embeddings are scaled to length 1. None: the pipeline's setting, else as the
                source model's files say.
            truncate_dim: Size that the embeddings are cut to. None: the pipeline's setting.

        Returns:
            float32 of shape (dimension,) for a text, or (texts, dimension) for a list, in its order. For an
            iterator, an iterator with one embedding per text.

        Raises:
            InputError: An input is not a text, the tokenizer returns no token for it, or the model does not have
                the prompt.
        """
        if isinstance(inputs, Iterator):
            options: dict[str, Any] = {"prompt": prompt, "prompt_name": prompt_name, "truncate_dim": truncate_dim}
            return (self(text, normalize=normalize, **options) for text in inputs)
        is_single = isinstance(inputs, str)
        texts = _checked_texts([inputs] if is_single else inputs)
        rows_per_call = checked_batch_size(batch_size) or self.batch_size
        size = _checked_size(truncate_dim, self.truncate_dim)
        if normalize is None:
            normalize = self.normalize
        items = self._prepared(texts, self._recipe.text.prompt(prompt, prompt_name))
        if is_single:
            # A copy: a view would keep all tokens in memory for as long as the caller keeps the embedding.
            embeddings = np.array(run_item(self.model, next(items), self._embed), dtype=np.float32)
        else:
            embeddings = np.empty((len(texts), self._size), dtype=np.float32)
            for index, embedding in enumerate(run_rows(self.model, items, self._embed, batch_size=rows_per_call)):
                embeddings[index] = embedding
        # As in sentence-transformers, the module scales the whole embedding, and the argument the cut one.
        if self._recipe.normalizes and normalize is not False:
            embeddings = unit_length(embeddings)
        embeddings = embeddings[..., :size]
        return unit_length(embeddings) if normalize else embeddings

    def _embed(self, prompt_length: int, row_outputs: list[Arrays]) -> Embeddings:
        return self._unscaled.embed(row_outputs[0][_TOKENS][0], prompt_length)

    def _prompt_length(self, prompt: str) -> int:
        """Return the number of tokens of a prompt; 0 if its tokens are pooled like the others."""
        if not prompt or self._recipe.includes_prompt:
            return 0
        settings = {"padding": False, "truncation": True, "max_length": self.max_tokens}
        ids = self.tokenizer.encoded(prompt, **settings)["input_ids"]
        # A special token at the end comes after the text, when there is one.
        return len(ids) - int(ids[-1] in self.tokenizer.all_special_ids)

    def _prepared(self, texts: Sequence[str], prompt: str) -> Iterator[PreparedItem[int]]:
        prompt_length = self._prompt_length(prompt)
        prompted_texts = [prompt + text for text in texts]
        for row in tokenized_rows(self.model, self.tokenizer, prompted_texts, max_tokens=self.max_tokens):
            yield PreparedItem([row], prompt_length)

    def __repr__(self) -> str:
        return (
            f"SentenceEmbeddingPipeline(modules={self._recipe.modules}, normalize={self.normalize}, "
            f"dimension={self.dimension}, max_tokens={self.max_tokens})"
        )


def _embedding_size(recipe: EmbeddingRecipe, token_size: int) -> int:
    """Return the size of an embedding before it is cut.

    Raises:
        LoadError: The sizes of two modules differ.
    """
    try:
        return int(recipe.embed(np.zeros((1, token_size), np.float32)).size)
    except (KeyError, ValueError) as error:
        raise LoadError(
            f"The modules of the model do not fit its tokens of size {token_size}: {error}.",
            hint="Compile the model again, with the pooling that it was trained with.",
        ) from error


def _checked_size(value: Any, default: int | None) -> int | None:
    """Return a size that embeddings are cut to, or the default for None."""
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"truncate_dim is {value!r}.", hint="Pass a positive integer, or leave it out.")
    return value


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
