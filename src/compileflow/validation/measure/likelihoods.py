"""Likelihoods: how likely both models find the tokens of natural texts, all positions of a text in one call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Normal quantile of a two-sided 95 % interval.
_TWO_SIDED_95 = 1.96


@dataclass
class Likelihoods:
    """Collects the distance of the predicted distributions, and the perplexity of both models.

    The model reads the source text whatever it predicts (teacher forcing), so that one wrong token does not change
    all later ones.
    """

    _divergences: list[NDArray[np.float64]] = field(default_factory=list)
    _texts: list[tuple[float, float, int]] = field(default_factory=list)

    def add(self, text: str, before: Any, after: Any, next_ids: Sequence[int]) -> None:
        """Add one text.

        Args:
            text: The text.
            before: Logits of the source model, of shape (tokens, vocabulary).
            after: Logits of the compiled model, of the same shape.
            next_ids: Token that follows at each position.
        """
        p, q = _log_softmax(before), _log_softmax(after)
        self._divergences.append(np.sum(np.exp(p) * (p - q), axis=-1))
        places = np.arange(len(next_ids))
        self._texts.append((float(p[places, next_ids].sum()), float(q[places, next_ids].sum()), len(next_ids)))

    def scalars(self) -> dict[str, float]:
        """Return the mean and the 99.9th percentile of the divergence, and the change of the perplexity.

        `kl_mean` and `kl_p999` are KL(source model || compiled model) in nats; `perplexity_change` is |ratio - 1|.
        """
        if not self._texts:
            return {}
        divergences = np.concatenate(self._divergences)
        change, _ = self._change()
        return {
            "kl_mean": float(divergences.mean()),
            "kl_p999": float(np.quantile(divergences, 0.999)),
            "perplexity_change": abs(math.expm1(change)),
        }

    def details(self) -> dict[str, str]:
        """Return the perplexities and the interval of their change, in words."""
        if not self._texts:
            return {}
        tokens = sum(count for _, _, count in self._texts)
        before, after = (math.exp(min(-sum(row[side] for row in self._texts) / tokens, 700.0)) for side in (0, 1))
        change, error = self._change()
        low, high = (100 * math.expm1(change + sign * _TWO_SIDED_95 * error) for sign in (-1, 1))
        return {
            "perplexity_change": f"perplexity {before:.4g} of the source model, {after:.4g} of the compiled model "
            f"on {tokens} tokens; change {low:+.3f} % to {high:+.3f} % with 95 % confidence"
        }

    def _change(self) -> tuple[float, float]:
        """Return the change of the mean negative log-likelihood of a token, and its standard error over texts.

        The tokens of one text are not independent, so this is the error of a ratio of sums over texts.
        """
        losses = np.array([before - after for before, after, _ in self._texts])
        counts = np.array([count for _, _, count in self._texts])
        change = float(losses.sum() / counts.sum())
        if len(losses) < 2 or not math.isfinite(change):
            return change, math.inf if math.isfinite(change) else math.nan
        residuals = losses - change * counts
        n = len(losses)
        return change, float(math.sqrt(np.square(residuals).sum() * n / (n - 1)) / counts.sum())


def _log_softmax(logits: Any) -> NDArray[np.float64]:
    """Return log probabilities along the last axis, in float64."""
    shifted = np.asarray(logits, np.float64)
    shifted = shifted - shifted.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))
