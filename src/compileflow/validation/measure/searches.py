"""Searches: which relevant documents both models find, by embeddings or by scores."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from compileflow.validation.cases.labels import Ranked, Searched

# So many of the documents count as found, and never more than half of the shortest list.
_FIRST = 10


@dataclass(frozen=True)
class Found:
    """Relevant documents of one query.

    Attributes:
        text: The query.
        relevant: Number of relevant documents.
        before: How many of them the source model finds.
        lost: Those that the compiled model does not find.
        gained: Those that the compiled model alone finds.
    """

    text: str
    relevant: int
    before: int
    lost: int
    gained: int


@dataclass
class Searches:
    """Collects the answers to labelled queries and documents; pairs are of the source and the compiled model.

    Attributes:
        cosine_tie: Difference of two similarities below which both documents are equally near.
        score_tie: Share of the scores' standard deviation up to which two scores are equal.
    """

    cosine_tie: float = 0.0
    score_tie: float = 0.0
    _embeddings: list[tuple[str, Searched, Any, Any]] = field(default_factory=list)
    _scores: list[tuple[Ranked, float, float]] = field(default_factory=list)

    def add_embedding(self, text: str, truth: Searched, before: Any, after: Any) -> None:
        """Add the embeddings of a query or a document, each of shape (size,)."""
        self._embeddings.append((text, truth, before, after))

    def add_score(self, truth: Ranked, before: float, after: float) -> None:
        """Add the scores of a document."""
        self._scores.append((truth, before, after))

    def found(self) -> tuple[int, list[Found]]:
        """Return how many documents are looked at for each query, and what is found among them.

        A query needs two documents, and a relevant one.
        """
        lists = [entry for entry in self._lists() if len(entry[1]) > 1 and entry[1].any()]
        if not lists:
            return 0, []
        k = min(_FIRST, max(1, min(len(relevant) for _, relevant, _, _ in lists) // 2))
        tie = self.cosine_tie
        if self._scores:
            before = np.asarray([score for _, score, _ in self._scores])
            tie = self.score_tie * before.std()
        return k, [_found(text, relevant, before, after, k, tie) for text, relevant, before, after in lists]

    def _lists(self) -> list[tuple[str, Any, Any, Any]]:
        """Return each query with its documents: whether they are relevant, and both models' scores of them."""
        lists = []
        by_query = defaultdict(list)
        for ranked, *scores in self._scores:
            by_query[ranked.query].append((ranked.is_relevant, *scores))
        for query, documents in by_query.items():
            relevant, before, after = map(np.asarray, zip(*documents, strict=True))
            lists.append((query, relevant, before, after))
        documents_of_all = [entry for entry in self._embeddings if entry[1].name is not None]
        for query, truth, *embeddings in self._embeddings:
            others = [entry for entry in documents_of_all if entry[1] is not truth]
            if truth.relevant and others:
                relevant = np.asarray([entry[1].name in truth.relevant for entry in others])
                vectors: list[Any] = [np.stack(side) for side in list(zip(*others, strict=True))[2:]]
                before, after = map(_cosines, embeddings, vectors)
                lists.append((query, relevant, before, after))
        return lists


def _cosines(vector: Any, vectors: Any) -> Any:
    vector, vectors = np.asarray(vector, np.float64), np.asarray(vectors, np.float64)
    return vectors @ vector / np.maximum(np.linalg.norm(vectors, axis=1) * np.linalg.norm(vector), 1e-12)


def _found(text: str, relevant: Any, before: Any, after: Any, k: int, tie: float) -> Found:
    order = np.argsort(-before, kind="stable")
    was_first, is_first = np.zeros(len(before), bool), np.zeros(len(before), bool)
    was_first[order[:k]] = True
    is_first[np.argsort(-after, kind="stable")[:k]] = True
    # Where the source model has not decided which of two documents is among the first, either is right.
    last, next_one = before[order[k - 1]], before[order[k]]
    undecided = np.where(was_first, before - next_one <= tie, last - before <= tie)
    changed = (was_first != is_first) & ~undecided & relevant
    return Found(
        text,
        int(relevant.sum()),
        int((was_first & relevant).sum()),
        int((changed & was_first).sum()),
        int((changed & is_first).sum()),
    )
