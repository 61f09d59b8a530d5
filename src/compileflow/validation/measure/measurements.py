"""Measurements: every number that a validation measures, and how a model is called for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from compileflow.contracts import LATENCY_ON_BUSY_MACHINE, Arrays
from compileflow.validation.measure.coverage import Covered
from compileflow.validation.measure.scores import LabelScore

Model = Callable[[Arrays], Arrays]


@dataclass(frozen=True)
class Latency:
    """Paired timings at one input shape.

    Attributes:
        shape: Input shape as "batch x tokens".
        reference_p50_ms: Median of the source model, milliseconds.
        candidate_p50_ms: Median of the compiled model, milliseconds.
        ratio: Median over the pairs of candidate / reference; below 1 the compiled model is faster.
        ratio_low: Lower end of the 95 % bootstrap interval of `ratio`.
        ratio_high: Upper end of that interval.
        pairs: Number of pairs.
        cpu_ratio: Least processor time of a call with one thread, candidate / reference; None if it was not
            measured.
        busy: What other processes did to the timing, in words; such a latency is shown, and nothing uses it. Empty
            on a quiet machine.
        written_tokens: Tokens that each row of a call gets after the tokens of the shape; 0 if a call writes none.
    """

    shape: str
    reference_p50_ms: float
    candidate_p50_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    pairs: int
    cpu_ratio: float | None = None
    busy: str = ""
    written_tokens: int = 0


@dataclass
class Measurements:
    """Everything that was measured.

    Attributes:
        comparisons: One row per example and output: `metrics.compare`, and case, family, output and text.
        rates: One row per example and metric: `metric`, `hits`, `trials`.
        scalars: One number per metric.
        unusable: For some metrics, why no gate may use what was measured.
        details: For some metrics of `scalars`, what was found, in words.
        noise: Noise of the source model: `max_abs_diff` and `rel_l2` between runs that should be equal.
        floors: The same per output, for each difference that is compared.
        grid: Figures of the source model with numbers rounded to the format of the precision; empty at fp32.
        grid_floors: Largest differences of the rounded source model, per output.
        latencies: Paired timings; the first is the headline.
        notes: Sentences for the report about what could not be measured.
        coverage: Shapes and token ids that were met, and how many there are.
        score: Score of both models on the labels of the examples; None without labels.
    """

    comparisons: list[dict[str, Any]] = field(default_factory=list)
    rates: list[dict[str, Any]] = field(default_factory=list)
    scalars: dict[str, float] = field(default_factory=dict)
    unusable: dict[str, str] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)
    noise: dict[str, float] = field(default_factory=dict)
    floors: dict[str, dict[str, float]] = field(default_factory=dict)
    grid: dict[str, float] = field(default_factory=dict)
    grid_floors: dict[str, dict[str, float]] = field(default_factory=dict)
    latencies: list[Latency] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    coverage: tuple[Covered, ...] = ()
    score: LabelScore | None = None

    def figures(self) -> dict[str, float]:
        """Return the few numbers that a registry keeps; all of them are finite."""
        figures = dict(self.scalars)
        for covered in self.coverage:
            name = covered.subject.replace(" ", "_")
            figures |= {name: float(covered.count), f"{name}_of": float(covered.total)}
        for name in ("max_abs_diff", "rel_l2", "one_minus_cosine"):
            values = [float(row[name]) for row in self.comparisons]
            if values and np.isfinite(values).all():
                figures[name] = max(values)
        for metric in sorted({row["metric"] for row in self.rates}):
            rows = [row for row in self.rates if row["metric"] == metric]
            figures[metric] = sum(row["hits"] for row in rows) / sum(row["trials"] for row in rows)
        if self.score is not None:
            figures["labelled_examples"] = float(self.score.examples)
        if self.latencies and self.latencies[0].busy:
            figures[LATENCY_ON_BUSY_MACHINE] = 1.0
        elif self.latencies:
            headline = asdict(self.latencies[0])
            figures |= {
                f"latency_{name}": float(value)
                for name, value in headline.items()
                if isinstance(value, int | float)
            }
        return {name: value for name, value in figures.items() if np.isfinite(value)}


def candidate_answer(candidate: Model, inputs: Arrays) -> tuple[Arrays, str]:
    """Return the candidate's outputs, or none and the error's text for the report.

    A candidate that raises has answered wrongly, which the gates then see.
    """
    try:
        return candidate(inputs), ""
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - the runtimes' errors have no narrower common base
        return {}, f"{type(error).__name__}: {error}"
