"""What a service would do with the outputs, and how often both models lead to the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np

from compileflow.contracts import Arrays
from compileflow.spec import HfTask
from compileflow.validation.measure import metrics
from compileflow.validation.cases.text import Case
from compileflow.validation.measure.flips import (
    SURE_MARGIN,
    Change,
    Decode,
    Flip,
    Words,
    choice,
    listed,
    span_choice,
    token_choice,
)

# A reference that wavers this little between two answers has not decided; either counts as agreement.
TIE_MARGIN = 1e-3
_NEIGHBOURS = 10
# Tasks with one decision an input.
_WHOLE = (HfTask.TEXT_CLASSIFICATION, HfTask.IMAGE_CLASSIFICATION, HfTask.AUDIO_CLASSIFICATION)


@dataclass
class Decisions:
    """Collects decisions over the natural examples of one task.

    Attributes:
        task: Decides what a decision is; one of `GRAPH_TASKS`.
        labels: id2label of the model's configuration; of speech, its characters.
        multi_label: True when each label is decided alone.
    """

    task: HfTask
    labels: dict[int, str] = field(default_factory=dict)
    multi_label: bool = False
    _rates: list[dict[str, Any]] = field(default_factory=list)
    _confident_flips: int = 0
    _logits: list[tuple[Any, Any]] = field(default_factory=list)
    _embeddings: list[tuple[Any, Any]] = field(default_factory=list)
    _tags: list[tuple[list[str], list[str]]] = field(default_factory=list)
    _texts: list[str] = field(default_factory=list)
    _changes: list[Change] = field(default_factory=list)

    def add(self, case: Case, expected: Arrays, actual: Arrays) -> None:
        """Take in one natural batch. Outputs of the wrong shape are left to the shape gate."""
        if any(name not in actual or actual[name].shape != value.shape for name, value in expected.items()):
            return
        for row, text in enumerate(case.texts):
            kept = case.mask[row].astype(bool)
            if self.task in _WHOLE:
                self._add_label(text, expected["logits"][row], actual["logits"][row])
                continue
            if self.task is HfTask.SPEECH_RECOGNITION:
                self._add_speech(text, expected["logits"][row][kept], actual["logits"][row][kept])
                continue
            ids = [int(token) for token in case.inputs["input_ids"][row][kept]]
            if self.task is HfTask.FEATURE_EXTRACTION:
                self._texts.append(text)
                self._embeddings.append(
                    (
                        expected["last_hidden_state"][row][kept].mean(axis=0),
                        actual["last_hidden_state"][row][kept].mean(axis=0),
                    )
                )
            elif self.task is HfTask.TOKEN_CLASSIFICATION:
                self._add_tokens(text, ids, expected["logits"][row][kept], actual["logits"][row][kept])
            elif self.task is HfTask.FILL_MASK:
                position = case.positions[row]
                self._add_mask(text, expected["logits"][row, position], actual["logits"][row, position])
            else:
                names = ("start_logits", "end_logits")
                before, after = ([side[name][row][kept] for name in names] for side in (expected, actual))
                self._add_span(text, ids, before, after)

    def rates(self) -> list[dict[str, Any]]:
        """Return one row an example and metric: metric, text, hits, trials."""
        kept, k = self._neighbours()
        return self._rates + [{"metric": "neighbour_overlap", "text": "", "hits": n, "trials": k} for n in kept]

    def scalars(self) -> dict[str, float]:
        """Return one number a metric, over all examples."""
        found: dict[str, float] = {}
        if self.task in (*_WHOLE, HfTask.TOKEN_CLASSIFICATION) and self._logits:
            before, after = (np.concatenate(side) for side in zip(*self._logits, strict=True))
            found["misplaced_labels"] = metrics.misplaced_labels(before, after)
            found["confident_flips"] = self._confident_flips
        if self._tags:
            before_tags, after_tags = zip(*self._tags, strict=True)
            found["entity_f1"] = metrics.entity_f1(before_tags, after_tags)
        return found

    def flips(self, decode: Decode, limit: int = 50) -> tuple[Flip, ...]:
        """Return the examples whose decision differs, the surest first; ties of the source model are none.

        For embeddings, the ten that lost most of their nearest neighbours.

        Args:
            decode: Turns token ids into text: a tokenizer's `decode`.
            limit: Rows at most.
        """
        changes = sorted(self._changes, key=lambda change: (-(change.margin or 0.0), change.text))
        changes += self._moved()[:_NEIGHBOURS]
        return tuple(change.flip(decode) for change in changes[:limit])

    def flips_count(self) -> int:
        """Return how many examples flipped; for embeddings, how many lost a neighbour."""
        return len(self._changes) + len(self._moved())

    def _neighbours(self) -> tuple[list[int], int]:
        """Return how many of its k nearest others each example keeps, and k; tasks without embeddings: none."""
        if len(self._embeddings) < 2:
            return [], 0
        before, after = (np.stack(side) for side in zip(*self._embeddings, strict=True))
        k = min(_NEIGHBOURS, len(before) - 1)
        return metrics.neighbour_overlaps(before, after, k), k

    def _moved(self) -> list[Change]:
        """Return the examples that lost neighbours, those that lost most first."""
        kept, k = self._neighbours()
        found = sorted((n, text) for n, text in zip(kept, self._texts, strict=False) if n < k)
        return [
            Change("neighbour_overlap", text, None, [f"{k} nearest examples"], [f"{k - n} of them lost"])
            for n, text in found
        ]

    def _add_label(self, text: str, before: Any, after: Any) -> None:
        self._logits.append((before[None], after[None]))
        if not self.multi_label and before.size > 1:
            words: list[Words] = [[choice(side, self._name)] for side in (before, after)]
            self._count("label_agreement", text, before[None], after[None], lambda _: words)
            return
        # Each label alone: yes against no is a choice of two.
        before, after = sides = [np.stack([-x / 2, x / 2], axis=-1) for x in (before, after)]

        def say(flipped: list[int]) -> list[Words]:
            return [
                listed([[f"{self._name(n)}: {choice(side[n], ('no', 'yes').__getitem__)}"] for n in flipped])
                for side in sides
            ]

        self._count("label_agreement", text, before, after, say)

    def _add_tokens(self, text: str, ids: list[int], before: Any, after: Any) -> None:
        self._logits.append((before, after))

        def say(flipped: list[int]) -> list[Words]:
            return [
                listed([[f"token {n} ", [ids[n]], f": {choice(side[n], self._name)}"] for n in flipped])
                for side in (before, after)
            ]

        self._count("label_agreement", text, before, after, say)
        tags = [[self._name(int(label)) for label in side.argmax(-1)] for side in (before, after)]
        self._tags.append((tags[0], tags[1]))

    def _add_speech(self, text: str, before: Any, after: Any) -> None:
        """Compare what is heard in each frame, and the transcript: a run of one character is one (CTC)."""
        if not len(before):
            return
        heard = [[int(n) for n, _ in groupby(side.argmax(-1))] for side in (before, after)]

        def say(flipped: list[int]) -> list[Words]:
            return [
                listed([[f"frame {n}: {choice(side[n], self._name)}"] for n in flipped])
                for side in (before, after)
            ]

        flips = len(self._changes)
        self._count("label_agreement", text, before, after, say)
        same = heard[0] == heard[1] or len(self._changes) == flips
        self._rates.append({"metric": "exact_transcript", "text": text, "hits": int(same), "trials": 1})

    def _add_mask(self, text: str, before: Any, after: Any) -> None:
        words = [token_choice(side) for side in (before, after)]
        self._count("label_agreement", text, before[None], after[None], lambda _: words)
        k = min(5, before.size)
        hits = metrics.overlap_at(before, after, k)
        self._rates.append({"metric": "top5_overlap", "text": text, "hits": hits, "trials": k})

    def _add_span(self, text: str, ids: list[int], before: list[Any], after: list[Any]) -> None:
        margins = [
            float(metrics.margins(one))
            for one, other in zip(before, after, strict=True)
            if one.argmax() != other.argmax()
        ]
        # A span flips with either end; an end where the reference wavers does not count.
        margin = max(margins, default=0.0)
        agrees = margin < TIE_MARGIN
        self._rates.append({"metric": "exact_span", "text": text, "hits": int(agrees), "trials": 1})
        if not agrees:
            words = [span_choice(ids, side) for side in (before, after)]
            self._changes.append(Change("exact_span", text, margin, *words))

    def _count(
        self, metric: str, text: str, before: Any, after: Any, say: Callable[[list[int]], list[Words]]
    ) -> None:
        """Count decisions, logits of shape (decisions, choices); `say` puts those that flipped into words."""
        margin = metrics.margins(before)
        same = before.argmax(-1) == after.argmax(-1)
        flipped = ~same & (margin >= TIE_MARGIN)
        self._confident_flips += int((~same & (margin > SURE_MARGIN)).sum())
        self._rates.append({"metric": metric, "text": text, "hits": int((~flipped).sum()), "trials": len(same)})
        if flipped.any():
            words = say([int(n) for n in np.flatnonzero(flipped)])
            self._changes.append(Change(metric, text, float(margin[flipped].max()), *words))

    def _name(self, label: int) -> str:
        return self.labels.get(label, str(label))
