"""Decisions: what a service would do with the outputs, and how often both models decide alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np

from compileflow.contracts import Arrays
from compileflow.spec import HfTask
from compileflow.validation.cases.case import Case
from compileflow.validation.measure import metrics
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

# With a smaller margin the reference has not decided between two answers; either counts as agreement.
TIE_MARGIN = 1e-3
_NEIGHBOURS = 10
# Tasks with one decision per input.
_WHOLE_INPUT = (HfTask.TEXT_CLASSIFICATION, HfTask.IMAGE_CLASSIFICATION, HfTask.AUDIO_CLASSIFICATION)


@dataclass
class Decisions:
    """Collects decisions over the natural examples of one task.

    Attributes:
        task: Task that defines the decision; one of `GRAPH_TASKS`.
        labels: Name of each class: id2label of the model's configuration, or the characters of a speech model.
        multi_label: True if the model decides about each label separately.
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
        """Add one natural batch. Outputs of the wrong shape are judged by the shape gate."""
        if any(name not in actual or actual[name].shape != value.shape for name, value in expected.items()):
            return
        for row, text in enumerate(case.texts):
            mask = case.mask[row].astype(bool)
            if self.task in _WHOLE_INPUT:
                self._add_label(text, expected["logits"][row], actual["logits"][row])
                continue
            if self.task is HfTask.SPEECH_RECOGNITION:
                self._add_speech(text, expected["logits"][row][mask], actual["logits"][row][mask])
                continue
            ids = [int(token) for token in case.inputs["input_ids"][row][mask]]
            if self.task is HfTask.FEATURE_EXTRACTION:
                self._texts.append(text)
                self._embeddings.append(
                    (
                        expected["last_hidden_state"][row][mask].mean(axis=0),
                        actual["last_hidden_state"][row][mask].mean(axis=0),
                    )
                )
            elif self.task is HfTask.TOKEN_CLASSIFICATION:
                self._add_tokens(text, ids, expected["logits"][row][mask], actual["logits"][row][mask])
            elif self.task is HfTask.FILL_MASK:
                position = case.positions[row]
                self._add_mask(text, expected["logits"][row, position], actual["logits"][row, position])
            else:
                names = ("start_logits", "end_logits")
                before, after = ([outputs[name][row][mask] for name in names] for outputs in (expected, actual))
                self._add_span(text, ids, before, after)

    def rates(self) -> list[dict[str, Any]]:
        """Return one row per example and metric: metric, text, hits, trials."""
        overlaps, k = self._neighbours()
        return self._rates + [
            {"metric": "neighbour_overlap", "text": "", "hits": overlap, "trials": k} for overlap in overlaps
        ]

    def scalars(self) -> dict[str, float]:
        """Return one number per metric, over all examples."""
        scalars: dict[str, float] = {}
        if self.task in (*_WHOLE_INPUT, HfTask.TOKEN_CLASSIFICATION) and self._logits:
            before, after = (np.concatenate(logits) for logits in zip(*self._logits, strict=True))
            scalars["misplaced_labels"] = metrics.misplaced_labels(before, after)
            scalars["confident_flips"] = self._confident_flips
        if self._tags:
            before_tags, after_tags = zip(*self._tags, strict=True)
            scalars["entity_f1"] = metrics.entity_f1(before_tags, after_tags)
        return scalars

    def flips(self, decode: Decode, limit: int = 50) -> tuple[Flip, ...]:
        """Return the examples whose decision differs, most confident first. Ties of the source model do not count.

        For embeddings: the ten examples that lost most of their nearest neighbours.

        Args:
            decode: Function from token ids to text, such as a tokenizer's `decode`.
            limit: Maximum number of flips to return.
        """
        changes = sorted(self._changes, key=lambda change: (-(change.margin or 0.0), change.text))
        changes += self._moved()[:_NEIGHBOURS]
        return tuple(change.flip(decode) for change in changes[:limit])

    def flips_count(self) -> int:
        """Return how many examples flipped; for embeddings, how many lost a neighbour."""
        return len(self._changes) + len(self._moved())

    def _neighbours(self) -> tuple[list[int], int]:
        """Return how many of its k nearest others each example keeps, and k; empty without embeddings."""
        if len(self._embeddings) < 2:
            return [], 0
        before, after = (np.stack(embeddings) for embeddings in zip(*self._embeddings, strict=True))
        k = min(_NEIGHBOURS, len(before) - 1)
        return metrics.neighbour_overlaps(before, after, k), k

    def _moved(self) -> list[Change]:
        """Return the examples that lost neighbours; those that lost most come first."""
        overlaps, k = self._neighbours()
        losses = sorted(
            (overlap, text) for overlap, text in zip(overlaps, self._texts, strict=False) if overlap < k
        )
        return [
            Change("neighbour_overlap", text, None, [f"{k} nearest examples"], [f"{k - overlap} of them lost"])
            for overlap, text in losses
        ]

    def _add_label(self, text: str, before: Any, after: Any) -> None:
        self._logits.append((before[None], after[None]))
        if not self.multi_label and before.size > 1:
            words: list[Words] = [[choice(logits, self._name)] for logits in (before, after)]
            self._count("label_agreement", text, before[None], after[None], lambda _: words)
            return
        # Each label is a choice of two: no or yes.
        before, after = pair = [np.stack([-logits / 2, logits / 2], axis=-1) for logits in (before, after)]

        def describe(flipped: list[int]) -> list[Words]:
            return [
                listed([[f"{self._name(i)}: {choice(logits[i], ('no', 'yes').__getitem__)}"] for i in flipped])
                for logits in pair
            ]

        self._count("label_agreement", text, before, after, describe)

    def _add_tokens(self, text: str, ids: list[int], before: Any, after: Any) -> None:
        self._logits.append((before, after))

        def describe(flipped: list[int]) -> list[Words]:
            return [
                listed([[f"token {i} ", [ids[i]], f": {choice(logits[i], self._name)}"] for i in flipped])
                for logits in (before, after)
            ]

        self._count("label_agreement", text, before, after, describe)
        tags = [[self._name(int(label)) for label in logits.argmax(-1)] for logits in (before, after)]
        self._tags.append((tags[0], tags[1]))

    def _add_speech(self, text: str, before: Any, after: Any) -> None:
        """Compare the character of each frame, and the transcript, where repeats of a character merge (CTC)."""
        if not len(before):
            return
        transcripts = [[int(label) for label, _ in groupby(logits.argmax(-1))] for logits in (before, after)]

        def describe(flipped: list[int]) -> list[Words]:
            return [
                listed([[f"frame {i}: {choice(logits[i], self._name)}"] for i in flipped])
                for logits in (before, after)
            ]

        flips = len(self._changes)
        self._count("label_agreement", text, before, after, describe)
        is_equal = transcripts[0] == transcripts[1] or len(self._changes) == flips
        self._rates.append({"metric": "exact_transcript", "text": text, "hits": int(is_equal), "trials": 1})

    def _add_mask(self, text: str, before: Any, after: Any) -> None:
        words = [token_choice(logits) for logits in (before, after)]
        self._count("label_agreement", text, before[None], after[None], lambda _: words)
        k = min(5, before.size)
        hits = metrics.overlap_at(before, after, k)
        self._rates.append({"metric": "top5_overlap", "text": text, "hits": hits, "trials": k})

    def _add_span(self, text: str, ids: list[int], before: list[Any], after: list[Any]) -> None:
        margins = [
            float(metrics.margins(before_logits))
            for before_logits, after_logits in zip(before, after, strict=True)
            if before_logits.argmax() != after_logits.argmax()
        ]
        # A span flips with either end, but not with an end that is a tie of the reference.
        margin = max(margins, default=0.0)
        is_equal = margin < TIE_MARGIN
        self._rates.append({"metric": "exact_span", "text": text, "hits": int(is_equal), "trials": 1})
        if not is_equal:
            words = [span_choice(ids, ends) for ends in (before, after)]
            self._changes.append(Change("exact_span", text, margin, *words))

    def _count(
        self, metric: str, text: str, before: Any, after: Any, describe: Callable[[list[int]], list[Words]]
    ) -> None:
        """Count decisions, logits of shape (decisions, choices); `describe` puts the flipped ones into words."""
        margin = metrics.margins(before)
        equals = before.argmax(-1) == after.argmax(-1)
        flipped = ~equals & (margin >= TIE_MARGIN)
        self._confident_flips += int((~equals & (margin > SURE_MARGIN)).sum())
        self._rates.append({"metric": metric, "text": text, "hits": int((~flipped).sum()), "trials": len(equals)})
        if flipped.any():
            words = describe([int(position) for position in np.flatnonzero(flipped)])
            self._changes.append(Change(metric, text, float(margin[flipped].max()), *words))

    def _name(self, label: int) -> str:
        return self.labels.get(label, str(label))
