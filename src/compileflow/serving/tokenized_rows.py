"""Texts and pairs of texts as rows of a component, tokenized as sentence-transformers does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

from compileflow.contracts import Arrays, ComponentRecord
from compileflow.errors import InputError, LoadError
from compileflow.serving.padding import token_row

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
    if len(texts) == 1 and (pairs is None or pairs[0]):
        # A list of one text would go through the tokenizer's pool of threads. Beside a single text, transformers
        # takes an empty one for none.
        pair = None if pairs is None else pairs[0]
        yield _row(record, texts[0], _encoded(tokenizer, texts[0], pair, max_tokens))
        return
    for start in range(0, len(texts), _TEXTS_PER_CALL):
        chunk = slice(start, start + _TEXTS_PER_CALL)
        encoded = _encoded(tokenizer, texts[chunk], None if pairs is None else pairs[chunk], max_tokens)
        for index, text in enumerate(texts[chunk]):
            yield _row(record, text, {name: values[index] for name, values in encoded.items()})


def _encoded(tokenizer: Any, texts: Any, pairs: Any, max_tokens: int) -> Any:
    # Without the mask: it would be all ones, and `token_row` adds it faster.
    # The settings of an artifact that was compiled from memory may pad each row to the compiled shape.
    return tokenizer.encoded(
        texts,
        *([] if pairs is None else [pairs]),
        padding=False,
        truncation=True,
        max_length=max_tokens,
        return_attention_mask=False,
    )


def _row(record: ComponentRecord, text: str, tokens: Any) -> Arrays:
    if not tokens["input_ids"]:
        raise InputError(f"The tokenizer returns no token for the text {text!r}.", hint="Leave it out.")
    return token_row(record, tokens)


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
