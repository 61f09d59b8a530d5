"""The comparison of all candidates: the winner and why, the table, comparison.json and comparison.html."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, model_validator

from compileflow.selection.candidates import Candidate
from compileflow.selection.choice import drops, pareto_front
from compileflow.selection.scatter import letter, scatter
from compileflow.spec import HfTask, Objective
from compileflow.validation.report import fraction, megabytes, percent, write_page

COMPARISON_JSON, COMPARISON_HTML = "comparison.json", "comparison.html"
_REASON_LENGTH = 160


class Comparison(BaseModel):
    """All candidates for one source model, and the chosen one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = 1
    source_uri: str
    source_revision: str
    source_digest: str
    hf_task: HfTask
    objective: Objective
    allow_warn: bool
    candidates: tuple[Candidate, ...]
    winner: int | None
    reason: str
    environment: dict[str, str]

    @model_validator(mode="after")
    def _winner_is_a_candidate(self) -> Comparison:
        if self.winner is not None and not 0 <= self.winner < len(self.candidates):
            raise ValueError(
                f"the winner is number {self.winner} of {len(self.candidates)} candidates, counted from 0"
            )
        return self

    @property
    def shapes(self) -> tuple[str, ...]:
        """Shapes at which at least one candidate was timed, in the order of timing."""
        return tuple(
            dict.fromkeys(latency.shape for candidate in self.candidates for latency in candidate.latencies)
        )

    @property
    def throughput_unit(self) -> str:
        """What the throughput of the candidates counts: "tokens" or "rows"."""
        return "tokens" if self.hf_task.generates else "rows"

    def dropped(self) -> dict[int, str]:
        """Return the candidates that cannot be chosen: position and reason."""
        reasons = drops(self.candidates, self.objective, allow_warn=self.allow_warn)
        return {position: drop.detail for position, drop in reasons.items() if position != self.winner}

    def marks(self) -> list[str]:
        """Return one word per candidate: chosen, front, dropped, or empty."""
        words = dict.fromkeys(pareto_front(self.candidates), "front") | dict.fromkeys(self.dropped(), "dropped")
        if self.winner is not None:
            words[self.winner] = "chosen"
        return [words.get(position, "") for position in range(len(self.candidates))]

    def comparison_header(self) -> tuple[str, ...]:
        """Return the titles of `comparison_rows`."""
        return (
            "",
            "candidate",
            "verdict",
            f"latency / eager at {', '.join(self.shapes) or 'no shape'}",
            "accuracy loss",
            "size",
            "memory",
            "compile",
            "outcome",
        )

    def comparison_rows(self) -> list[tuple[str, ...]]:
        """Return the table for a terminal: one row per candidate that was tried, "-" if not measured.

        Columns: letter in the page's picture, label, verdict, latency as a fraction of eager's at each shape,
        accuracy loss, size, serving memory, compile time, and the mark: "chosen", "front" or "dropped".
        """
        return [
            (
                letter(position),
                candidate.label,
                candidate.outcome,
                "  ".join(_ratio(candidate, shape) for shape in self.shapes) or "-",
                "-" if candidate.accuracy_loss is None else percent(candidate.accuracy_loss),
                "-" if candidate.size_bytes is None else megabytes(candidate.size_bytes),
                "-" if candidate.serving_memory_bytes is None else megabytes(candidate.serving_memory_bytes),
                compile_words(candidate),
                mark,
            )
            for position, (candidate, mark) in enumerate(zip(self.candidates, self.marks(), strict=True))
            if candidate.outcome != "unavailable"
        ]

    def comparison_notes(self) -> list[str]:
        """Return one line per candidate that cannot be chosen, with the reason."""
        return [
            f"{'not tried' if candidate.outcome == 'unavailable' else 'dropped'}: {candidate.label}: "
            f"{_shortened(self.dropped()[position])}"
            for position, candidate in enumerate(self.candidates)
            if position in self.dropped()
        ]


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Write comparison.json and comparison.html into an existing folder."""
    drops_by_position = comparison.dropped()
    picture = scatter(
        comparison.candidates,
        winner=comparison.winner,
        front=pareto_front(comparison.candidates),
        drops=drops_by_position,
        description=f"{comparison.reason}. The table has every number.",
    )
    values = {
        "comparison": comparison,
        "marks": comparison.marks(),
        "dropped": drops_by_position,
        "picture": picture,
        "letter": letter,
        "percent": percent,
        "fraction": fraction,
        "megabytes": megabytes,
        "compile_words": compile_words,
    }
    write_page(
        folder,
        comparison,
        json_name=COMPARISON_JSON,
        html_name=COMPARISON_HTML,
        values=values,
        package="compileflow.selection",
    )


def compile_words(candidate: Candidate) -> str:
    """Return the duration of the compile as text, and whether it came from the cache."""
    if candidate.compile_duration_s is None:
        return "-"
    return f"{candidate.compile_duration_s:.1f} s{', cached' if candidate.cached else ''}"


def _ratio(candidate: Candidate, shape: str) -> str:
    return next(
        (
            fraction(latency.ratio) + (" (busy machine)" if latency.busy else "")
            for latency in candidate.latencies
            if latency.shape == shape
        ),
        "-",
    )


def _shortened(text: str) -> str:
    return text if len(text) <= _REASON_LENGTH else f"{text[: _REASON_LENGTH - 3]}..."
