"""Metrics: numbers that compare a reference array with a candidate array, all computed in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# The tolerances of numpy.isclose in `tolerance_use`.
_ATOL, _RTOL = 1e-4, 1e-3


def compare(reference: Array, candidate: Array) -> dict[str, float | int]:
    """Compare one output of one example.

    Args:
        reference: Output of the source model, any shape, without padding.
        candidate: Output of the compiled model.

    Returns:
        `shape_matches` (1 or 0), `reference_nonfinite_count`, `candidate_nonfinite_count`, `n_values`, and five
        numbers that are NaN if shapes differ or an element is not finite: `max_abs_diff` in the output's units;
        `rel_l2` = ||r - c|| / ||r||; `one_minus_cosine`; `tolerance_use` = max(|r - c| / (1e-4 + 1e-3 |r|)),
        which is at most 1 if numpy.isclose(c, r, rtol=1e-3, atol=1e-4) holds everywhere; and `peak_error` =
        max |r - c| / max |r|, which does not depend on the output's units.

        `rel_l2` and `one_minus_cosine` of a single number, such as the score of a ranking model, are those of a
        vector of that number and 1: the number has no direction, and its relative error has no bound near zero.

    >>> compare(np.array([3.0, 4.0]), np.array([3.0, 4.5]))["rel_l2"]
    0.1
    """
    r, c = np.asarray(reference, np.float64), np.asarray(candidate, np.float64)
    row: dict[str, float | int] = {
        "shape_matches": int(r.shape == c.shape),
        "reference_nonfinite_count": int(r.size - np.isfinite(r).sum()),
        "candidate_nonfinite_count": int(c.size - np.isfinite(c).sum()),
        "n_values": int(r.size),
    }
    names = ("max_abs_diff", "rel_l2", "one_minus_cosine", "tolerance_use", "peak_error")
    comparable = (
        row["shape_matches"]
        and not row["reference_nonfinite_count"]
        and not row["candidate_nonfinite_count"]
        and r.size
    )
    if not comparable:
        return row | dict.fromkeys(names, float("nan"))
    difference = np.abs(r - c)
    vectors = (np.append(r, 1.0), np.append(c, 1.0)) if r.size == 1 else (r, c)
    return row | {
        "max_abs_diff": float(difference.max()),
        "rel_l2": rel_l2(*vectors),
        "one_minus_cosine": one_minus_cosine(*vectors),
        "tolerance_use": float((difference / (_ATOL + _RTOL * np.abs(r))).max()),
        "peak_error": _share(float(difference.max()), float(np.abs(r).max())),
    }


def rel_l2(reference: Array, candidate: Array) -> float:
    """Return ||r - c|| / ||r||; 0 if both are zero, infinity if only the reference is."""
    r, c = np.asarray(reference, np.float64), np.asarray(candidate, np.float64)
    return _share(float(np.linalg.norm(r - c)), float(np.linalg.norm(r)))


def one_minus_cosine(reference: Array, candidate: Array) -> float:
    """Return 1 - cos(r, c), from 0 to 2.

    For unit vectors |u - v|^2 = 2 - 2 cos(u, v); this form is exact near 0, where 1 - cos(u, v) cancels.
    """
    r, c = np.asarray(reference, np.float64).ravel(), np.asarray(candidate, np.float64).ravel()
    nr, nc = float(np.linalg.norm(r)), float(np.linalg.norm(c))
    if nr == 0.0 or nc == 0.0:
        return 0.0 if nr == nc else 1.0
    return float(np.sum((r / nr - c / nc) ** 2) / 2)


def softmax(logits: Array) -> Array:
    """Return probabilities over the last axis."""
    shifted = np.asarray(logits, np.float64) - np.max(logits, axis=-1, keepdims=True)
    exponents = np.exp(shifted)
    return np.asarray(exponents / exponents.sum(axis=-1, keepdims=True))


def margins(logits: Array) -> Array:
    """Return the probability of the first choice minus that of the second, over the last axis."""
    probabilities = softmax(logits)
    if probabilities.shape[-1] < 2:
        return np.ones(probabilities.shape[:-1])
    top = np.partition(probabilities, -2, axis=-1)
    return np.asarray(top[..., -1] - top[..., -2])


def overlap_at(reference: Array, candidate: Array, k: int) -> int:
    """Return how many of the k largest entries two score vectors have in common."""
    k = min(k, reference.size)
    best = [set(np.argsort(-scores, kind="stable")[:k].tolist()) for scores in (reference, candidate)]
    return len(best[0] & best[1])


def neighbour_overlaps(reference: Array, candidate: Array, k: int = 10) -> list[int]:
    """Return how many of its k nearest neighbours each example keeps.

    Args:
        reference: Embeddings of the source model, shape (examples, dimensions).
        candidate: Embeddings of the compiled model, of the reference's shape.
        k: Number of neighbours by cosine similarity; the example itself does not count.
    """
    similarities = []
    for embeddings in (reference, candidate):
        unit = np.asarray(embeddings, np.float64)
        unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
        similarity = unit @ unit.T
        np.fill_diagonal(similarity, -np.inf)
        similarities.append(similarity)
    return [
        overlap_at(before, after, min(k, len(before) - 1)) for before, after in zip(*similarities, strict=True)
    ]


def misplaced_labels(reference: Array, candidate: Array) -> int:
    """Count labels whose column of logits moved to another place.

    A column is misplaced if another column of the candidate fits it more than twice as well as the column in
    its own place. Equal columns cannot be told apart and do not count.

    Args:
        reference: Logits of the source model, shape (examples, labels).
        candidate: Logits of the compiled model, of the reference's shape.
    """
    r, c = np.asarray(reference, np.float64), np.asarray(candidate, np.float64)
    if not (np.isfinite(r).all() and np.isfinite(c).all()):
        return 0
    # Column by column, since all pairs at once would take examples x labels x labels numbers.
    distances = (np.linalg.norm(r[:, label, None] - c, axis=0) for label in range(r.shape[1]))
    return sum(bool(distance.min() < 0.5 * distance[label]) for label, distance in enumerate(distances))


def mean_iou(before: Sequence[Array], after: Sequence[Array]) -> float:
    """Return the mean over the labels of intersection over union, of all pictures of labels together.

    Args:
        before: Labels that the source model gives to the pixels of each picture, any shape.
        after: Labels that the compiled model gives to them.
    """
    r, c = (np.concatenate([labels.ravel() for labels in pictures]) for pictures in (before, after))
    size = int(max(r.max(), c.max())) + 1
    intersections = np.bincount(r[r == c], minlength=size)
    unions = np.bincount(r, minlength=size) + np.bincount(c, minlength=size) - intersections
    return float(np.mean(intersections[unions > 0] / unions[unions > 0]))


def _share(part: float, whole: float) -> float:
    """Return part / whole; 0 if both are zero, infinity if only the whole is."""
    if whole == 0.0:
        return 0.0 if part == 0.0 else float("inf")
    return part / whole


def spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Return entities as (type, start, end): from BIO prefixes if there are any, else from runs of one tag."""
    entities = set()
    open_entity: tuple[str, int] | None = None
    for position, tag in enumerate([*tags, "O"]):
        prefix, dash, entity_type = tag.partition("-")
        kind = "" if tag == "O" else entity_type if dash and prefix in ("B", "I") else tag
        is_start = bool(dash) and prefix == "B"
        if open_entity is not None and (is_start or kind != open_entity[0]):
            entities.add((open_entity[0], open_entity[1], position))
            open_entity = None
        if open_entity is None and kind:
            open_entity = (kind, position)
    return entities


def entity_f1(reference: Sequence[Sequence[str]], candidate: Sequence[Sequence[str]]) -> float:
    """Return the micro F1 of the candidate's entities against the reference's, over all examples."""
    hits = total = 0
    for before, after in zip(reference, candidate, strict=True):
        before_spans, after_spans = spans(before), spans(after)
        hits += len(before_spans & after_spans)
        total += len(before_spans) + len(after_spans)
    return 1.0 if total == 0 else 2 * hits / total
