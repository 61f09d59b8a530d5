"""Detections: labels, scores and boxes of an object detector's queries, and their order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compileflow.contracts import Arrays, TensorRecord
from compileflow.validation.measure import metrics


def detected(logits: Any, label_count: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return the label of each query, its score and its margin, from logits of shape (queries, labels).

    Detectors with one more logit than labels choose among the labels and "nothing"; others score each label alone.
    """
    has_nothing = logits.shape[-1] > label_count
    scores = metrics.softmax(logits)[:, :-1] if has_nothing else np.asarray(logits, np.float64)
    return scores.argmax(-1), scores.max(-1), metrics.margins(logits)


def corners(boxes: Any) -> NDArray[Any]:
    """Turn boxes (centre x, centre y, width, height) into (left, top, right, bottom), over the last axis."""
    centres, half_sizes = boxes[..., :2], boxes[..., 2:] / 2
    return np.concatenate([centres - half_sizes, centres + half_sizes], axis=-1)


def in_same_order(outputs: Sequence[TensorRecord], expected: Arrays, actual: Arrays) -> Arrays:
    """Return the compiled model's outputs with its queries in the order of the source model's.

    Detectors with two stages sort their queries by score, so that rounding may swap two of them.

    Args:
        outputs: Records of the outputs.
        expected: Outputs of the source model.
        actual: Outputs of the compiled model.
    """
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    names = ("logits", "pred_boxes")
    if any(name not in actual or actual[name].shape != expected[name].shape for name in names):
        return actual
    if not all(np.isfinite(actual[name]).all() for name in names):
        return actual
    before, after = (np.concatenate([answer[name] for name in names], axis=-1) for answer in (expected, actual))
    orders = [linear_sum_assignment(cdist(*queries))[1] for queries in zip(before, after, strict=True)]
    ordered = {name: value.copy() for name, value in actual.items()}
    for record in outputs:
        if "batch" not in record.axes or before.shape[1] not in record.axes:
            continue
        batch_first = np.moveaxis(ordered[record.name], record.axes.index("batch"), 0)
        axes = [axis for axis in record.axes if axis != "batch"]
        for row, order in zip(batch_first, orders, strict=True):
            row[...] = row.take(order, axes.index(before.shape[1]))
    return ordered
