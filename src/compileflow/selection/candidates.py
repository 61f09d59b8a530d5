"""Candidates: the ways of compiling one model, with their measured latency, accuracy loss and size."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from compileflow.contracts import Outcome
from compileflow.errors import MeasurementError
from compileflow.spec import Precision
from compileflow.validation.measure import Latency

# Outcome of a candidate that was compiled and tried in the first round, and that needs no validation.
UNVALIDATED = "unvalidated"
_AGREEMENTS = ("label_agreement", "exact_span", "neighbour_overlap", "entity_f1", "next_token")


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class CandidateLatency(_Value):
    """Latency of one candidate at one shape, timed in turn with eager PyTorch."""

    shape: str = Field(description="Batch x tokens, for example 8 x 128.")
    batch_size: int = Field(ge=1)
    latency_p50_ms: float = Field(gt=0)
    reference_p50_ms: float = Field(gt=0)
    ratio: float = Field(gt=0, description="Latency as a fraction of eager's.")
    ratio_low: float
    ratio_high: float
    cpu_ratio: float | None = Field(None, description="Processor time of one thread as a fraction of eager's.")
    busy: str = Field("", description="What other processes did to the timing; then it is not used.")
    written_tokens: int = Field(0, ge=0, description="Tokens written after each row; 0 if a call writes none.")

    @classmethod
    def of(cls, latency: Latency) -> CandidateLatency:
        """Convert a report's latency."""
        return cls(
            shape=latency.shape,
            batch_size=int(latency.shape.partition(" ")[0]),
            latency_p50_ms=latency.candidate_p50_ms,
            reference_p50_ms=latency.reference_p50_ms,
            ratio=latency.ratio,
            ratio_low=latency.ratio_low,
            ratio_high=latency.ratio_high,
            cpu_ratio=latency.cpu_ratio,
            busy=latency.busy,
            written_tokens=latency.written_tokens,
        )


class Candidate(_Value):
    """One way of compiling the model, and its result. Numbers that were not measured are None."""

    target: str
    precision: Precision
    options: dict[str, JsonValue] = Field(default_factory=dict)
    outcome: Outcome | Literal["unavailable", "unvalidated"]
    reason: str = Field(description="One line: the reason of the verdict, or why the verdict is missing.")
    latencies: tuple[CandidateLatency, ...] = ()
    accuracy_loss: float | None = Field(None, ge=0, le=1, description="Share of decisions that changed.")
    rel_l2: float | None = None
    size_bytes: int | None = Field(None, ge=0)
    serving_memory_bytes: int | None = Field(None, ge=0)
    compile_duration_s: float | None = Field(None, ge=0)
    artifact_uri: str | None = None
    report_uri: str | None = None
    cached: bool = False

    @property
    def label(self) -> str:
        """Target, precision and options: "openvino int8 quantization=static"."""
        options = (
            f"{name}={value if isinstance(value, str) else json.dumps(value)}"
            for name, value in sorted(self.options.items())
        )
        return " ".join((self.target, self.precision.value, *options))

    @property
    def latency_ratio(self) -> float | None:
        """Latency as a fraction of eager's: the geometric mean over the shapes; None if it cannot be used."""
        if not self.latencies or self.is_busy:
            return None
        return math.exp(math.fsum(math.log(latency.ratio) for latency in self.latencies) / len(self.latencies))

    @property
    def is_busy(self) -> bool:
        """Whether a latency was measured on a busy machine."""
        return any(latency.busy for latency in self.latencies)

    @property
    def cpu_ratio(self) -> float | None:
        """Processor time of one thread as a fraction of eager's, at the first shape; None if not measured."""
        return self.latencies[0].cpu_ratio if self.latencies else None

    @property
    def throughput_per_s(self) -> float | None:
        """Rows, or written tokens, per second at the shape with the most of them; None if it cannot be used."""
        if self.is_busy:
            return None
        rates = (
            latency.batch_size * max(1, latency.written_tokens) * 1000 / latency.latency_p50_ms
            for latency in self.latencies
        )
        return max(rates, default=None)

    @property
    def throughput_unit(self) -> str:
        """What the throughput counts: "tokens" if a call writes some, else "rows"."""
        return "tokens" if any(latency.written_tokens for latency in self.latencies) else "rows"


def accuracy_loss_of(figures: Mapping[str, float]) -> float:
    """Return the share of decisions that changed: 1 minus the worst agreement in `Measurements.figures()`.

    Raises:
        MeasurementError: The figures have no agreement.
    """
    agreements = [figures[name] for name in _AGREEMENTS if name in figures]
    if not agreements:
        raise MeasurementError(
            f"The figures have no agreement, only {', '.join(sorted(figures)) or 'nothing'}.",
            hint=f"Measure one of: {', '.join(_AGREEMENTS)}.",
        )
    # In floating point 1 - 0.99 is a little more than 0.01, which a budget of 0.01 must allow.
    return round(1.0 - min(agreements), 12)
