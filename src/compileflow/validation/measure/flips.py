"""Flips: natural examples that the compiled model decides differently, with both decisions in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

# Above this margin of the reference, a flip is a fault at any precision.
SURE_MARGIN = 0.1

_TEXT_LENGTH, _ITEMS_NAMED, _SPAN_LENGTH = 200, 5, 100
_NO_NUMBER = "no number"

# A decision in words: text, and token ids that only the tokenizer can turn into text.
Words = list[str | list[int]]
Decode = Callable[[list[int]], str]


class Flip(BaseModel):
    """A natural example that the compiled model decides differently.

    Attributes:
        metric: Rate that the flip lowers.
        text: First 200 characters of the example.
        before: Decision of the source model.
        after: Decision of the compiled model.
        margin: Probability of the source model's first choice minus that of its second, the largest among the
            flipped decisions; None for embeddings, which have neighbours instead of choices.
        sure: True if the margin is too large for noise to explain the flip.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: str
    text: str
    before: str
    after: str
    margin: float | None
    sure: bool


@dataclass(frozen=True)
class Change:
    """A flip before a tokenizer has turned its token ids into text."""

    metric: str
    text: str
    margin: float | None
    before: Words
    after: Words

    def flip(self, decode: Decode) -> Flip:
        """Put the change into words."""
        return Flip(
            metric=self.metric,
            text=self.text[:_TEXT_LENGTH],
            before=_in_words(self.before, decode),
            after=_in_words(self.after, decode),
            margin=self.margin,
            sure=self.margin is not None and self.margin > SURE_MARGIN,
        )


def choice(logits: Any, names: Callable[[int], str]) -> str:
    """Name the choice with the largest of the logits, shape (choices,)."""
    return names(int(logits.argmax())) if np.isfinite(logits).all() else _NO_NUMBER


def token_choice(logits: Any) -> Words:
    """Name the token with the largest of the logits, shape (vocabulary,)."""
    return [[int(logits.argmax())]] if np.isfinite(logits).all() else [_NO_NUMBER]


def span_choice(ids: Sequence[int], logits: Sequence[Any]) -> Words:
    """Name the span between the largest start and the largest end logit, each of shape (tokens,)."""
    if not all(np.isfinite(end_logits).all() for end_logits in logits):
        return [_NO_NUMBER]
    start, end = (int(end_logits.argmax()) for end_logits in logits)
    if end < start:
        return [f"no span: start {start}, end {end}"]
    return [f"tokens {start} to {end}: ", list(ids[start : end + 1])]


def listed(items: Sequence[Words]) -> Words:
    """Join the first five items with commas, and count the rest."""
    words: Words = []
    for position, item in enumerate(items[:_ITEMS_NAMED]):
        words += [*([", "] if position else []), *item]
    if len(items) > _ITEMS_NAMED:
        words.append(f" and {len(items) - _ITEMS_NAMED} more")
    return words


def _in_words(words: Words, decode: Decode) -> str:
    parts = []
    for word in words:
        text = word if isinstance(word, str) else decode(word).strip()
        parts.append(text if isinstance(word, str) or len(text) <= _SPAN_LENGTH else f"{text[:_SPAN_LENGTH]}...")
    return "".join(parts)
