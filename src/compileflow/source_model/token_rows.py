"""TokenRows: what a row of token ids looks like, with special tokens only where the tokenizer puts them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compileflow.spec import HfTask

# Any two texts show where a tokenizer puts its special tokens.
_FIRST_TEXT, _SECOND_TEXT = "It arrived on time", "the train was late"
_SPECIAL_NAMES = ("bos", "eos", "pad", "sep", "cls", "mask", "decoder_start")
# Ids for a model that takes any number, such as the code points of CANINE.
_ANY_IDS = 256


@dataclass(frozen=True)
class TokenRows:
    """The form of the rows that a text model takes.

    Some models look for a token: BART's classifier for the end of the text, a decoder's for the padding, question
    answering for the separator. Random ids would put these tokens anywhere.

    Attributes:
        vocab_size: Number of token ids.
        pad_token_id: Token beyond the end of a row.
        before: Special tokens before the text.
        between: Special tokens between two texts; () for rows of one text.
        after: Special tokens after the text.
        after_types: Token types of `after`; () if the tokenizer returns no types.
        special_ids: Ids that stand for no text.
    """

    vocab_size: int
    pad_token_id: int = 0
    before: tuple[int, ...] = ()
    between: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    after_types: tuple[int, ...] = ()
    special_ids: frozenset[int] = frozenset()

    @property
    def shortest(self) -> int:
        """Length of the shortest row in which each text has a token."""
        return len(self.before) + len(self.between) + len(self.after) + (2 if self.between else 1)

    def text_ids(self) -> NDArray[np.int64]:
        """Return the ids that stand for text."""
        ids = np.setdiff1d(np.arange(self.vocab_size or _ANY_IDS), sorted(self.special_ids))
        return ids if ids.size else np.arange(self.vocab_size or _ANY_IDS)

    def content(self, length: int) -> int:
        """Return how many text ids a row of this length holds; at least one of each text."""
        return max(length, self.shortest) - self.shortest + (2 if self.between else 1)

    def filled(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return a row of these text ids between the special tokens."""
        first, second = (ids[: len(ids) // 2], ids[len(ids) // 2 :]) if self.between else (ids, ids[:0])
        return np.concatenate([self.before, first, self.between, second, self.after]).astype(np.int64)

    def row(self, length: int, random: np.random.Generator) -> NDArray[np.int64]:
        """Return a row of random text between the special tokens; a row that is too short keeps the last ones."""
        row = self.filled(random.choice(self.text_ids(), self.content(length)))
        return row[len(row) - length :]

    def types(self, length: int) -> NDArray[np.int64]:
        """Return the token types of a row: both of them, whatever the tokenizer does with a single text."""
        types = (np.arange(length) >= length // 2).astype(np.int64)
        after_types = self.after_types[max(0, len(self.after_types) - length) :]
        types[length - len(after_types) :] = after_types
        return types


def token_rows(tokenizer: Any, config: Any, vocab_size: int, hf_task: HfTask) -> TokenRows:
    """Read the form of a model's rows off its tokenizer; without one, off its configuration.

    Args:
        tokenizer: Tokenizer of the model; None without one.
        config: Configuration of the model.
        vocab_size: Number of token ids of the model; 0 if it takes any.
        hf_task: Task of the model.
    """
    pairs = hf_task.reads_pairs
    config = text_config(config)
    named_ids = [getattr(config, f"{name}_token_id", None) for name in _SPECIAL_NAMES]
    special_ids = {number for value in named_ids for number in _as_numbers(value)}
    if tokenizer is None:
        # Text may not end with the token. A model that looks for it needs one.
        eos_token_ids = _as_numbers(getattr(config, "eos_token_id", None))
        end = [number for number in eos_token_ids[:1] if number != pad_token(config, None)]
        after: Sequence[int] = end
        before: Sequence[int] = ()
        between: Sequence[int] = end if pairs else ()
        after_types: Sequence[int] = ()
        size = vocab_size
    else:
        special_ids |= {int(number) for number in tokenizer.all_special_ids if number is not None}
        encoded = _encoded(tokenizer, pairs=pairs)
        ids, is_special = encoded["input_ids"], [bool(value) for value in encoded["special_tokens_mask"]]
        before = ids[: len(list(takewhile(bool, is_special)))]
        after = ids[len(ids) - len(list(takewhile(bool, reversed(is_special)))) :] if not all(is_special) else ()
        inner = range(len(before), len(ids) - len(after))
        between = [ids[index] for index in inner if is_special[index]] if pairs else ()
        after_types = list(encoded.get("token_type_ids", ()))[len(ids) - len(after) :]
        size = vocab_size or len(tokenizer)
    known = range(size)
    return TokenRows(
        vocab_size=size,
        pad_token_id=pad_token(config, tokenizer),
        before=tuple(number for number in before if number in known),
        between=tuple(number for number in between if number in known),
        after=tuple(number for number in after if number in known),
        after_types=tuple(after_types),
        special_ids=frozenset(special_ids),
    )


def pad_token(config: Any, tokenizer: Any) -> int:
    """Return the token that fills a row: the model's, else the tokenizer's, else 0."""
    for owner in (text_config(config), tokenizer):
        numbers = _as_numbers(getattr(owner, "pad_token_id", None))
        if numbers and numbers[0] >= 0:
            return numbers[0]
    return 0


def text_config(config: Any) -> Any:
    """Return the part of a configuration that describes text: models of two parts keep it in a nested one."""
    find = getattr(config, "get_text_config", None)
    try:
        return find() if find is not None else config
    # Several parts describe text, for example encoder and decoder.
    except ValueError:
        return config


def _encoded(tokenizer: Any, *, pairs: bool) -> Any:
    texts = (_FIRST_TEXT, _SECOND_TEXT) if pairs else (_FIRST_TEXT,)
    settings = {"padding": False, "truncation": False, "return_special_tokens_mask": True}
    return tokenizer(*texts, return_token_type_ids=True, **settings)


def _as_numbers(value: Any) -> list[int]:
    """Return a token id of a configuration as a list: it may be absent, a number or several numbers."""
    if value is None:
        return []
    return [int(number) for number in (value if isinstance(value, list | tuple) else [value])]
