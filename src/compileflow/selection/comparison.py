"""The comparison of many candidates: what won and why, the table, the picture, comparison.json and .html."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, model_validator

from compileflow.selection.candidates import Candidate, CandidateLatency, accuracy_loss_of
from compileflow.selection.choice import choose, drops, pareto_front
from compileflow.selection.pareto import key, scatter
from compileflow.selection.text_plot import text_scatter
from compileflow.spec import HfTask, Objective
from compileflow.validation.report import megabytes, percent, write_page

__all__ = [
    "COMPARISON_HTML",
    "COMPARISON_JSON",
    "Candidate",
    "CandidateLatency",
    "Comparison",
    "Objective",
    "accuracy_loss_of",
    "choose",
    "pareto_front",
    "plot_text",
    "write_comparison",
]

COMPARISON_JSON, COMPARISON_HTML = "comparison.json", "comparison.html"
_REASON_LENGTH = 160


class Comparison(BaseModel):
    """All candidates for one source model, and the one that was chosen."""

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
            raise ValueError(f"the winner is number {self.winner} of {len(self.candidates)} candidates, from 0")
        return self

    @property
    def shapes(self) -> tuple[str, ...]:
        """Shapes that at least one candidate was timed at, in the order of timing."""
        return tuple(dict.fromkeys(each.shape for one in self.candidates for each in one.latencies))

    def dropped(self) -> dict[int, str]:
        """Return why each of those that cannot be chosen cannot, by position."""
        found = drops(self.candidates, self.objective, allow_warn=self.allow_warn)
        return {position: drop.detail for position, drop in found.items() if position != self.winner}

    def marks(self) -> list[str]:
        """Return one word a candidate: chosen, front, dropped, or nothing."""
        front, dropped = pareto_front(self.candidates), self.dropped()
        return [
            "chosen" if n == self.winner else "dropped" if n in dropped else "front" if n in front else ""
            for n in range(len(self.candidates))
        ]

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
        """Return the table for a terminal, a row a candidate that was tried, "-" for what was not measured.

        The letter that the picture has, label, verdict, latency as a fraction of eager's at each shape, accuracy
        loss, size, serving memory, compile time, and the mark: "chosen", "front" or "dropped".
        """
        return [
            (
                key(position),
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
        """Return a line for each candidate that cannot be chosen, with the reason."""
        return [
            f"{'not tried' if candidate.outcome == 'unavailable' else 'dropped'}: {candidate.label}: "
            f"{_shortened(self.dropped()[position])}"
            for position, candidate in enumerate(self.candidates)
            if position in self.dropped()
        ]


def plot_text(comparison: Comparison, width: int = 72, height: int = 16) -> str:
    """Draw the comparison in letters, those of the table's rows; small ones cannot be chosen.

    Args:
        comparison: What is drawn.
        width: Characters of a line of the picture; 40 or more.
        height: Lines of the picture; 8 or more.
    """
    dropped = comparison.dropped()
    return "\n".join(text_scatter(comparison.candidates, dropped=dropped, width=width, height=height))


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Write comparison.json and comparison.html into an existing folder."""
    dropped = comparison.dropped()
    picture = scatter(
        comparison.candidates,
        winner=comparison.winner,
        front=pareto_front(comparison.candidates),
        dropped=dropped,
    )
    values = {
        "comparison": comparison,
        "marks": comparison.marks(),
        "dropped": dropped,
        "picture": picture,
        "key": key,
        "percent": percent,
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
    """Say how long the compile took, and whether that was at another time."""
    if candidate.compile_duration_s is None:
        return "-"
    return f"{candidate.compile_duration_s:.1f} s{', cached' if candidate.cached else ''}"


def _ratio(candidate: Candidate, shape: str) -> str:
    return next((f"{each.ratio:.2f}" for each in candidate.latencies if each.shape == shape), "-")


def _shortened(text: str) -> str:
    return text if len(text) <= _REASON_LENGTH else f"{text[: _REASON_LENGTH - 3]}..."
