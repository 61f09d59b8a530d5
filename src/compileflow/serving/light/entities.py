"""How the scores of tokens become entities, as the token-classification pipeline of transformers groups them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compileflow.serving.light.tokenizer import LightTokenizer

Scores = NDArray[np.float32]
Entity = dict[str, Any]

STRATEGIES = ("none", "simple", "first", "average", "max")


@dataclass(frozen=True)
class ScoredToken:
    """A token of the text with the scores of all labels.

    Attributes:
        word: The token; for an unknown one, its part of the text.
        scores: Probability of each label, shape (labels,).
        index: Position in the row.
        start: First character in the text.
        end: Character behind the last one.
        is_subword: Whether the token continues the word before it.
    """

    word: str
    scores: Scores
    index: int
    start: int
    end: int
    is_subword: bool


@dataclass(frozen=True)
class EntityReader:
    """Turns the scores of a text's tokens into entities.

    Source: transformers/pipelines/token_classification.py, release 5.23.

    Attributes:
        tokenizer: Tokenizer of the model.
        id2label: Names of the labels by their number.
        strategy: How tokens are joined, one of `STRATEGIES`.
    """

    tokenizer: LightTokenizer
    id2label: Mapping[int, str]
    strategy: str

    def entities(self, tokens: Sequence[ScoredToken]) -> list[Entity]:
        """Return the entities of a row: one for each token, or groups of neighbours with the same label."""
        if self.strategy == "none":
            return [self._token_entity(token) for token in tokens]
        if self.strategy == "simple":
            entities = [self._token_entity(token) for token in tokens]
        else:
            entities = [self._word_entity(word) for word in _split(tokens, lambda _, token: not token.is_subword)]
        return [self._joined(group) for group in _split(entities, _starts_entity)]

    def _token_entity(self, token: ScoredToken) -> Entity:
        number = int(token.scores.argmax())
        return {
            "entity": self.id2label[number],
            "score": token.scores[number],
            "index": token.index,
            "word": token.word,
            "start": token.start,
            "end": token.end,
        }

    def _word_entity(self, tokens: Sequence[ScoredToken]) -> Entity:
        """Return the entity of a word, whose tokens may disagree about the label."""
        if self.strategy == "average":
            scores = np.nanmean(np.stack([token.scores for token in tokens]), axis=0)
        elif self.strategy == "first":
            scores = tokens[0].scores
        else:
            scores = max((token.scores for token in tokens), key=lambda values: values.max())
        number = int(scores.argmax())
        return {
            "entity": self.id2label[number],
            "score": scores[number],
            "word": self.tokenizer.convert_tokens_to_string([token.word for token in tokens]),
            "start": tokens[0].start,
            "end": tokens[-1].end,
        }

    def _joined(self, entities: Sequence[Entity]) -> Entity:
        return {
            "entity_group": entities[0]["entity"].split("-", 1)[-1],
            "score": np.mean(np.nanmean([entity["score"] for entity in entities])),
            "word": self.tokenizer.convert_tokens_to_string([entity["word"] for entity in entities]),
            "start": entities[0]["start"],
            "end": entities[-1]["end"],
        }


def without_overlaps(entities: Sequence[Entity]) -> list[Entity]:
    """Return the entities of overlapping windows: of two that overlap, the longer one, else the likelier one."""
    if not entities:
        return []
    ordered = sorted(entities, key=lambda entity: entity["start"])
    kept = [ordered[0]]
    for entity in ordered:
        last = kept[-1]
        if not last["start"] <= entity["start"] < last["end"]:
            kept.append(entity)
        elif (entity["end"] - entity["start"], entity["score"]) > (last["end"] - last["start"], last["score"]):
            kept[-1] = entity
    return kept


def _starts_entity(last: Entity, entity: Entity) -> bool:
    begins, label = _tag(entity["entity"])
    return begins or label != _tag(last["entity"])[1]


def _tag(label: str) -> tuple[bool, str]:
    """Return whether a label begins an entity, and the label without B- or I-."""
    return label.startswith("B-"), label[2:] if label.startswith(("B-", "I-")) else label


def _split(items: Sequence[Any], starts: Callable[[Any, Any], bool]) -> list[list[Any]]:
    """Split items before each one that starts a group, given the item before it."""
    groups = [[item] for item in items[:1]]
    for last, item in pairwise(items):
        if starts(last, item):
            groups.append([item])
        else:
            groups[-1].append(item)
    return groups
