"""Tendencies: sums over all natural examples, from which the noise of a coarse number format cancels out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from compileflow.contracts import Arrays, TensorRecord
from compileflow.validation.cases.case import Case

SPECIAL_TOKEN_ERROR = "special_token_error"  # noqa: S105 - the name of a figure
# A smaller difference between the examples, as a share of the answers, is too small to be measured.
_LEAST_RESPONSE = 1e-3


@dataclass
class Tendencies:
    """Collects sums over the natural examples, per output.

    Rounding errors of two examples point in random directions, so they cancel in these sums. A wrong factor, or
    answers that do not depend on the input, do not.
    """

    _products: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    _vectors: dict[str, list[tuple[Any, Any]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, case: Case, outputs: Sequence[TensorRecord], expected: Arrays, actual: Arrays) -> None:
        """Add one natural batch. Outputs of the wrong shape are judged by the shape gate."""
        for record in outputs:
            before, after = expected[record.name], actual.get(record.name)
            if after is None or after.shape != before.shape or record.axes[0] != "batch":
                continue
            per_token = record.axes[1:2] in (("sequence",), ("frames",))
            for row in range(min(len(case.texts), len(before))):
                mask = case.mask[row].astype(bool) if per_token else ...
                r, c = (np.asarray(answer[row][mask], np.float64) for answer in (before, after))
                self._products[record.name].append((float(np.vdot(r, c)), float(np.vdot(r, r))))
                if r.ndim == 1 and per_token:
                    continue
                # Token by token would take too much memory; the mean of the tokens has a fixed size.
                self._vectors[record.name].append(
                    (r.mean(0), c.mean(0)) if per_token else (_pooled(r), _pooled(c))
                )

    def scalars(self, comparisons: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Return the worst output's numbers.

        `typical_error`: median rel_l2 of the natural examples. `gain_error`: |1 - g|, where g is the factor that
        turns the source model's answers into the compiled model's, by least squares. `response_error`: the same
        for the differences between the examples; it is 1 if the answers do not depend on the input. It is omitted
        if the source model's hardly do. `response_share`: those differences as a share of the answers.
        `special_token_error`: mean rel_l2 of the rows that repeat one special token, of the worst token.
        """
        scalars: dict[str, float] = {}
        if worst := worst_special_token(comparisons):
            scalars[SPECIAL_TOKEN_ERROR] = worst[1]
        errors: dict[str, list[float]] = defaultdict(list)
        for row in comparisons:
            if row["family"] == "agreement":
                errors[row["output"]].append(row["rel_l2"])
        if errors:
            scalars["typical_error"] = float(np.max([np.median(values) for values in errors.values()]))
        gains = [_slope_error(*np.sum(products, axis=0)) for products in self._products.values()]
        if gains:
            scalars["gain_error"] = float(np.max(gains))
        responses, shares = [], []
        for pairs in self._vectors.values():
            r, c = (np.stack(vectors) for vectors in zip(*pairs, strict=True))
            before, after = r - r.mean(0), c - c.mean(0)
            size = float(np.linalg.norm(r))
            if np.linalg.norm(before) > _LEAST_RESPONSE * size:
                shares.append(float(np.linalg.norm(before)) / size)
                responses.append(_slope_error(float(np.vdot(before, after)), float(np.vdot(before, before))))
        if responses:
            scalars |= {"response_error": float(np.max(responses)), "response_share": min(shares)}
        return scalars


def worst_special_token(comparisons: Sequence[Mapping[str, Any]]) -> tuple[str, float] | None:
    """Return the case of the special token whose rows differ most, and their mean rel_l2; None without any."""
    errors: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in comparisons:
        if row["family"] == "special":
            errors[row["case"], row["output"]].append(row["rel_l2"])
    means = [(case, float(np.mean(values))) for (case, _), values in errors.items()]
    return max(means, key=lambda mean: (np.isnan(mean[1]), mean[1]), default=None)


def _slope_error(product: float, square: float) -> float:
    """Return |1 - product / square|; for a source model that answers zeros, 0."""
    return abs(1.0 - product / square) if square > 0.0 else 0.0


def _pooled(values: Any) -> Any:
    """Return a vector: of (features, height, width) or (tokens, features), the means."""
    return values.reshape(len(values), -1).mean(1) if values.ndim == 3 else np.atleast_2d(values).mean(0)
