"""Texts and pairs of texts as rows of a component, tokenized as sentence-transformers does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import numpy as np

from compileflow.contracts import Arrays
from compileflow.errors import InputError, LoadError
from compileflow.serving.padding import complete_inputs

# How many texts one call of the tokenizer takes: a call for each text would be several times slower.
_TEXTS_PER_CALL = 1024


def tokenized_rows(
    model: Any, tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None = None, *, max_tokens: int
) -> Iterator[Arrays]:
    """Tokenize texts, and yield the inputs of the component for each, one row without padding.

    Args:
        model: CompiledModel.
        tokenizer: CompiledTokenizer of the model.
        texts: Texts, in order.
        pairs: Second text of each row; None for rows of one text.
        max_tokens: Longest row; longer texts are truncated, of a pair the longer one first.

    Raises:
        InputError: The tokenizer returns no token for a text.
    """
    record = model.graph.record
    names = {tensor.name for tensor in record.inputs}
    for start in range(0, len(texts), _TEXTS_PER_CALL):
        chunk = slice(start, start + _TEXTS_PER_CALL)
        # Without the mask: it would be all ones, and `complete_inputs` adds it faster.
        # The settings of an artifact that was compiled from memory may pad each row to the compiled shape.
        encoded = tokenizer.encoded(
            texts[chunk],
            *([] if pairs is None else [pairs[chunk]]),
            padding=False,
            truncation=True,
            max_length=max_tokens,
            return_attention_mask=False,
        )
        for index, text in enumerate(texts[chunk]):
            if not encoded["input_ids"][index]:
                raise InputError(f"The tokenizer returns no token for the text {text!r}.", hint="Leave it out.")
            # Some tokenizers return token types that their model does not have.
            row = {name: np.array([values[index]]) for name, values in encoded.items() if name in names}
            yield complete_inputs(record, row)


def lowering_tokenizer(tokenizer: Any) -> Any:
    """Return a tokenizer that lowercases texts before it normalizes them, but leaves special tokens unchanged.

    Raises:
        LoadError: The tokenizer is not a fast one.
    """
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
