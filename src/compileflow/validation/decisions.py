"""What a service would do with the outputs, and how often both models lead to the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from compileflow.contracts import Arrays
from compileflow.spec import HfTask
from compileflow.validation import metrics
from compileflow.validation.cases import Case

# A reference that wavers this little between two answers has not decided; either counts as agreement.
TIE_MARGIN = 1e-3
# A flip where the reference was this sure is a fault at any precision.
SURE_MARGIN = 0.1


@dataclass
class Decisions:
    """Collects decisions over the natural examples of one task.

    Attributes:
        task: Decides what a decision is.
        labels: id2label of the model's configuration.
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

    def add(self, case: Case, expected: Arrays, actual: Arrays) -> None:
        """Take in one natural batch. Outputs of the wrong shape are left to the shape gate."""
        if any(name not in actual or actual[name].shape != value.shape for name, value in expected.items()):
            return
        for row, text in enumerate(case.texts):
            kept = case.mask[row].astype(bool)
            if self.task is HfTask.FEATURE_EXTRACTION:
                self._embeddings.append(
                    (
                        expected["last_hidden_state"][row][kept].mean(axis=0),
                        actual["last_hidden_state"][row][kept].mean(axis=0),
                    )
                )
            elif self.task is HfTask.TEXT_CLASSIFICATION:
                self._add_label(text, expected["logits"][row], actual["logits"][row])
            elif self.task is HfTask.TOKEN_CLASSIFICATION:
                self._add_tokens(text, expected["logits"][row][kept], actual["logits"][row][kept])
            elif self.task is HfTask.FILL_MASK:
                position = case.positions[row]
                self._add_mask(text, expected["logits"][row, position], actual["logits"][row, position])
            else:
                self._add_span(text, row, kept, expected, actual)

    def rates(self) -> list[dict[str, Any]]:
        """Return one row an example and metric: metric, text, hits, trials."""
        rows = list(self._rates)
        if len(self._embeddings) > 1:
            before, after = (np.stack(side) for side in zip(*self._embeddings, strict=True))
            k = min(10, len(before) - 1)
            for hits in metrics.neighbour_overlaps(before, after, k):
                rows.append({"metric": "neighbour_overlap", "text": "", "hits": hits, "trials": k})
        return rows

    def scalars(self) -> dict[str, float]:
        """Return one number a metric, over all examples."""
        found: dict[str, float] = {}
        if self.task in (HfTask.TEXT_CLASSIFICATION, HfTask.TOKEN_CLASSIFICATION) and self._logits:
            before, after = (np.concatenate(side) for side in zip(*self._logits, strict=True))
            found["misplaced_labels"] = metrics.misplaced_labels(before, after)
            found["confident_flips"] = self._confident_flips
        if self._tags:
            before_tags, after_tags = zip(*self._tags, strict=True)
            found["entity_f1"] = metrics.entity_f1(before_tags, after_tags)
        return found

    def _add_label(self, text: str, before: Any, after: Any) -> None:
        self._logits.append((before[None], after[None]))
        if self.multi_label or before.size == 1:
            # Each label alone: yes against no is a choice of two.
            before, after = (np.stack([-x / 2, x / 2], axis=-1) for x in (before, after))
        else:
            before, after = before[None], after[None]
        self._count("label_agreement", text, before, after)

    def _add_tokens(self, text: str, before: Any, after: Any) -> None:
        self._logits.append((before, after))
        self._count("label_agreement", text, before, after)
        tags = [[self.labels.get(int(label), str(label)) for label in side.argmax(-1)] for side in (before, after)]
        self._tags.append((tags[0], tags[1]))

    def _add_mask(self, text: str, before: Any, after: Any) -> None:
        self._count("label_agreement", text, before[None], after[None])
        k = min(5, before.size)
        hits = metrics.overlap_at(before, after, k)
        self._rates.append({"metric": "top5_overlap", "text": text, "hits": hits, "trials": k})

    def _add_span(self, text: str, row: int, kept: Any, expected: Arrays, actual: Arrays) -> None:
        agrees = True
        for name in ("start_logits", "end_logits"):
            before, after = expected[name][row][kept], actual[name][row][kept]
            agrees &= bool(before.argmax() == after.argmax() or metrics.margins(before) < TIE_MARGIN)
        self._rates.append({"metric": "exact_span", "text": text, "hits": int(agrees), "trials": 1})

    def _count(self, metric: str, text: str, before: Any, after: Any) -> None:
        """Count decisions, logits of shape (decisions, choices)."""
        margin = metrics.margins(before)
        same = before.argmax(-1) == after.argmax(-1)
        hits = int((same | (margin < TIE_MARGIN)).sum())
        self._confident_flips += int((~same & (margin > SURE_MARGIN)).sum())
        self._rates.append({"metric": metric, "text": text, "hits": hits, "trials": len(same)})
