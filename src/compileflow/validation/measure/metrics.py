"""Metrics: numbers that compare a reference array with a candidate array, all computed in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compileflow.validation.cases.labels import spans

Array = NDArray[Any]

# The tolerances of numpy.isclose in `tolerance_use`.
_ATOL, _RTOL = 1e-4, 1e-3
# Few huge elements, as in some hidden states, do not set the scale of all others.
_LARGEST_PEAK = 20.0


@dataclass(frozen=True)
class Scale:
    """Scale of one output: medians over the examples.

    Attributes:
        norm: Root of the mean square of an example's elements.
        peak: Largest element of an example.
        typical_peak: Largest element, at most 20 times the median element.
    """

    norm: float
    peak: float
    typical_peak: float


def compare(reference: Array, candidate: Array) -> dict[str, float | int]:
    """Compare one output of one example.

    Args:
        reference: Output of the source model, any shape, without padding.
        candidate: Output of the compiled model.

    Returns:
        `shape_matches` (1 or 0), `reference_nonfinite_count`, `candidate_nonfinite_count`, `n_values`, and numbers
        that are NaN if shapes differ or an element is not finite: `max_abs_diff` in the output's units;
        `rel_l2` = ||r - c|| / ||r||; `one_minus_cosine`; `tolerance_use` = max(|r - c| / (1e-4 + 1e-3 |r|)),
        which is at most 1 if numpy.isclose(c, r, rtol=1e-3, atol=1e-4) holds everywhere; `peak_error` =
        max |r - c| / max |r|, which does not depend on the output's units; `scaled_diff` = `max_abs_diff`, divided
        by the largest element where that is above 1; and what `relate_to_scale` needs.

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
    names = (
        "max_abs_diff",
        "rel_l2",
        "one_minus_cosine",
        "tolerance_use",
        "peak_error",
        "scaled_diff",
        "difference_norm",
        "reference_norm",
        "reference_peak",
        "typical_peak",
    )
    comparable = (
        row["shape_matches"]
        and not row["reference_nonfinite_count"]
        and not row["candidate_nonfinite_count"]
        and r.size
    )
    if not comparable:
        return row | dict.fromkeys(names, float("nan"))
    difference, size = np.abs(r - c), np.abs(r)
    largest_difference, peak = float(difference.max()), float(size.max())
    typical_peak = min(peak, _LARGEST_PEAK * float(np.median(size)))
    vectors = (np.append(r, 1.0), np.append(c, 1.0)) if r.size == 1 else (r, c)
    return row | {
        "max_abs_diff": largest_difference,
        "rel_l2": rel_l2(*vectors),
        "one_minus_cosine": one_minus_cosine(*vectors),
        "tolerance_use": float((difference / (_ATOL + _RTOL * size)).max()),
        "peak_error": _share(largest_difference, peak),
        "scaled_diff": largest_difference / max(1.0, typical_peak),
        "difference_norm": float(np.linalg.norm(difference)),
        "reference_norm": float(np.linalg.norm(r)),
        "reference_peak": peak,
        "typical_peak": typical_peak,
    }


def scales_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Scale]:
    """Return the scale of each output, given rows of `compare` with the name of their `output`."""
    scales = {}
    for output in {row["output"] for row in rows}:
        measured_rows = [row for row in rows if row["output"] == output and np.isfinite(row["reference_norm"])]
        if measured_rows:
            norms = [row["reference_norm"] / np.sqrt(row["n_values"]) for row in measured_rows]
            peaks, typical_peaks = (
                [row[name] for row in measured_rows] for name in ("reference_peak", "typical_peak")
            )
            scales[output] = Scale(*(float(np.median(values)) for values in (norms, peaks, typical_peaks)))
    return scales


def relate_to_scale(rows: Sequence[dict[str, Any]], scales: Mapping[str, Scale]) -> None:
    """Relate the differences of each example to the scale of its output, in place.

    An answer may be small because large terms cancel, as a logit near zero. Rounding errors do not cancel, so they
    are large relative to that answer alone. `rel_l2`, `one_minus_cosine`, `peak_error` and `scaled_diff` therefore
    take the median size of the output's answers for the size of a smaller answer.
    """
    for row in rows:
        scale = scales.get(row["output"])
        if scale is None or not np.isfinite(row["reference_norm"]):
            continue
        norm = max(row["reference_norm"], scale.norm * float(np.sqrt(row["n_values"])))
        row["rel_l2"] = _share(row["difference_norm"], norm)
        if row["n_values"] == 1:
            # One number has no direction. This is the angle to it from the same number beside a constant.
            row["one_minus_cosine"] = min(2.0, row["rel_l2"] ** 2 / 2)
        elif norm > 0.0:
            row["one_minus_cosine"] *= (row["reference_norm"] / norm) ** 2
        row["peak_error"] = _share(row["max_abs_diff"], max(row["reference_peak"], scale.peak))
        row["scaled_diff"] = row["max_abs_diff"] / max(1.0, row["typical_peak"], scale.typical_peak)


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


def gaps(logits: Array) -> Array:
    """Return the largest logit minus the second, over the last axis; infinity for a single one."""
    logits = np.asarray(logits, np.float64)
    if logits.shape[-1] < 2:
        return np.full(logits.shape[:-1], np.inf)
    top = np.partition(logits, -2, axis=-1)
    return np.asarray(top[..., -1] - top[..., -2])


def overlap_at(reference: Array, candidate: Array, k: int, *, tie: float = 0.0) -> int:
    """Return how many of the k largest entries two score vectors have in common.

    An entry of the candidate also counts if its score in the reference is less than `tie` below the k-th.
    """
    k = min(k, reference.size)
    best = [np.argsort(-scores, kind="stable")[:k] for scores in (reference, candidate)]
    is_common = np.isin(best[1], best[0])
    if tie > 0.0:
        is_common |= reference[best[1]] > reference[best[0][-1]] - tie
    return int(is_common.sum())


def neighbour_overlaps(reference: Array, candidate: Array, k: int = 10, *, tie: float = 0.0) -> list[int]:
    """Return how many of its k nearest neighbours each example keeps.

    Args:
        reference: Embeddings of the source model, shape (examples, dimensions).
        candidate: Embeddings of the compiled model, of the reference's shape.
        k: Number of neighbours by cosine similarity; the example itself does not count.
        tie: Difference of two similarities below which both examples are equally near.
    """
    similarities = []
    for embeddings in (reference, candidate):
        unit = np.asarray(embeddings, np.float64)
        unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
        similarity = unit @ unit.T
        np.fill_diagonal(similarity, -np.inf)
        similarities.append(similarity)
    return [
        overlap_at(before, after, min(k, len(before) - 1), tie=tie)
        for before, after in zip(*similarities, strict=True)
    ]


def misplaced_labels(reference: Array, candidate: Array, *, tolerance: float = 0.0) -> int:
    """Count labels whose column of logits moved to another place.

    A column is misplaced if another column of the candidate fits it more than twice as well as the column in
    its own place. Equal columns cannot be told apart and do not count.

    Args:
        reference: Logits of the source model, shape (examples, labels).
        candidate: Logits of the compiled model, of the reference's shape.
        tolerance: Share of the logits' size by which a column in its own place may differ.
    """
    r, c = np.asarray(reference, np.float64), np.asarray(candidate, np.float64)
    if not (np.isfinite(r).all() and np.isfinite(c).all()):
        return 0
    # Column by column, since all pairs at once would take examples x labels x labels numbers.
    distances = (np.linalg.norm(r[:, label, None] - c, axis=0) for label in range(r.shape[1]))
    least = tolerance * float(np.linalg.norm(r)) / np.sqrt(max(1, r.shape[1]))
    return sum(
        bool(distance.min() < 0.5 * distance[label] and distance[label] > least)
        for label, distance in enumerate(distances)
    )


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


def entity_f1(reference: Sequence[Sequence[str]], candidate: Sequence[Sequence[str]]) -> float:
    """Return the micro F1 of the candidate's entities against the reference's, over all examples."""
    hits = total = 0
    for before, after in zip(reference, candidate, strict=True):
        before_spans, after_spans = spans(before), spans(after)
        hits += len(before_spans & after_spans)
        total += len(before_spans) + len(after_spans)
    return 1.0 if total == 0 else 2 * hits / total
