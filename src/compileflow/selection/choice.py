"""Choice: which candidates are dropped and why, which one wins, and which are on the Pareto front."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from compileflow.contracts import ACCEPTED_OUTCOMES
from compileflow.selection.candidates import UNVALIDATED, Candidate
from compileflow.spec import Objective
from compileflow.validation.measure.contention import BUSY_MACHINE
from compileflow.validation.report import fraction, megabytes, percent

# Latencies within this share of one another cannot be told apart from one run to the next.
SAME_LATENCY = 0.02

_OUTCOME_KINDS = {
    "warn": "got a warning, which is not allowed",
    "fail": "failed their gates",
    "error": "ended in an error",
    "unavailable": "cannot be compiled here",
}


@dataclass(frozen=True)
class Drop:
    """Why a candidate cannot be chosen: a kind that can be counted, and the detail."""

    kind: str
    detail: str


def drops(candidates: Sequence[Candidate], objective: Objective, *, allow_warn: bool) -> dict[int, Drop]:
    """Return the candidates that cannot be chosen, by position.

    A number that was not measured exceeds any budget. Speeds are compared only among candidates that were timed
    at the same shapes. If one of them was timed on a busy machine, processor time takes the place of latency.
    """
    drops_by_position: dict[int, Drop] = {}
    for position, candidate in enumerate(candidates):
        if candidate.outcome == UNVALIDATED:
            excess = known_excess(candidate, objective)
            drops_by_position[position] = excess or Drop("cannot win", candidate.reason)
        elif drop := _outcome_drop(candidate, allow_warn) or _budget_drop(candidate, objective):
            drops_by_position[position] = drop
    if objective.goal == "size":
        return drops_by_position
    shapes = {
        position: {latency.shape for latency in candidate.latencies}
        for position, candidate in enumerate(candidates)
        if position not in drops_by_position
    }
    all_shapes = set().union(*shapes.values())
    for position, timed in shapes.items():
        if not timed or timed != all_shapes:
            detail = f"not timed at {', '.join(sorted(all_shapes - timed)) or 'any shape'}"
            drops_by_position[position] = Drop("lacked a timing", detail)
    if _was_busy(candidates, shapes):
        for position in shapes:
            if position not in drops_by_position and candidates[position].cpu_ratio is None:
                detail = f"processor time was not measured, and a latency was {BUSY_MACHINE}"
                drops_by_position[position] = Drop("lacked a timing", detail)
    return drops_by_position


def choose(candidates: Sequence[Candidate], objective: Objective, *, allow_warn: bool) -> tuple[int | None, str]:
    """Choose the best candidate for the objective.

    Candidates that failed their gates, that warned although no warning is allowed, or that exceed a budget are
    dropped. The best of the others by the goal wins; for size, latency decides between equals. Among candidates
    within 2 % of the best speed, the smallest accuracy loss wins, then the higher speed, then the label that
    sorts first. If the machine was busy while one of them was timed, the least processor time is the best speed.

    Returns:
        Position of the winner, or None if every candidate was dropped, and the reason in one line.
    """
    if not candidates:
        return None, "No candidate was given."
    drops_by_position = drops(candidates, objective, allow_warn=allow_warn)
    eligible_positions = [position for position in range(len(candidates)) if position not in drops_by_position]
    if not eligible_positions:
        counts = Counter(drop.kind for drop in drops_by_position.values())
        kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
        details = {drop.detail for drop in drops_by_position.values()}
        shared_detail = f": {details.pop()}" if len(details) == 1 and len(drops_by_position) > 1 else "."
        return None, f"None of {len(candidates)} candidates can be chosen: {kinds}{shared_detail}"
    pool = eligible_positions
    if objective.goal == "size":
        smallest = min(_or_inf(candidates[position].size_bytes) for position in eligible_positions)
        pool = [position for position in eligible_positions if candidates[position].size_bytes == smallest]
    is_busy = _was_busy(candidates, eligible_positions)
    costs = {position: cost_of(candidates[position], objective, is_busy=is_busy) for position in pool}
    highest_cost = min(costs.values()) * (1 + SAME_LATENCY)
    winner = min(
        (position for position in pool if costs[position] <= highest_cost),
        key=lambda position: (
            _or_inf(candidates[position].accuracy_loss),
            costs[position],
            candidates[position].label,
            position,
        ),
    )
    return winner, _reason(
        candidates[winner],
        [candidates[position] for position in eligible_positions],
        objective,
        drop_count=len(drops_by_position),
        is_busy=is_busy,
    )


def pareto_front(candidates: Sequence[Candidate]) -> set[int]:
    """Return the candidates that no other candidate beats in latency, accuracy loss and size at once.

    Only candidates that passed or warned and that have all three numbers count. Lower is better in each.
    """
    points = {}
    for position, candidate in enumerate(candidates):
        point = (candidate.latency_ratio, candidate.accuracy_loss, candidate.size_bytes)
        if candidate.outcome in ACCEPTED_OUTCOMES and None not in point:
            points[position] = tuple(_or_inf(value) for value in point)

    def beaten(point: tuple[float, ...]) -> bool:
        return any(
            rival != point and all(rival_value <= value for rival_value, value in zip(rival, point, strict=True))
            for rival in points.values()
        )

    return {position for position, point in points.items() if not beaten(point)}


def _outcome_drop(candidate: Candidate, allow_warn: bool) -> Drop | None:
    if candidate.outcome == "pass" or (candidate.outcome == "warn" and allow_warn):
        return None
    prefix = "a warning is not allowed: " if candidate.outcome == "warn" else ""
    return Drop(
        _OUTCOME_KINDS[candidate.outcome], prefix + candidate.reason.removeprefix(f"{candidate.outcome}: ")
    )


def _budget_drop(candidate: Candidate, objective: Objective) -> Drop | None:
    loss, max_loss = candidate.accuracy_loss, objective.max_accuracy_loss
    if max_loss is not None and (loss is None or loss > max_loss):
        amount = "unknown" if loss is None else percent(loss)
        return Drop(
            "exceeded the accuracy budget", f"accuracy loss {amount}, at most {percent(max_loss)} is allowed"
        )
    for kind, size, limit in (
        ("serving memory", candidate.serving_memory_bytes, objective.max_serving_memory_bytes),
        ("size", candidate.size_bytes, objective.max_size_bytes),
    ):
        if limit is not None and (size is None or size > limit):
            amount = "unknown" if size is None else megabytes(size)
            return Drop(f"exceeded the {kind} budget", f"{kind} {amount}, at most {megabytes(limit)} is allowed")
    if objective.goal == "size" and candidate.size_bytes is None:
        return Drop("had no size", "its size is unknown")
    return None


def _was_busy(candidates: Sequence[Candidate], positions: Iterable[int]) -> bool:
    return any(candidates[position].is_busy for position in positions)


def known_excess(candidate: Candidate, objective: Objective) -> Drop | None:
    """Return the budget that a candidate exceeds by a number that was measured; None if there is none."""
    loss, size = candidate.accuracy_loss, candidate.size_bytes
    known = {} if loss is None else {"max_accuracy_loss": objective.max_accuracy_loss}
    known |= {} if size is None else {"max_size_bytes": objective.max_size_bytes}
    return _budget_drop(candidate, Objective(**known))


def cost_of(candidate: Candidate, objective: Objective, *, is_busy: bool) -> float:
    """Return what the goal makes small: latency, time for each row, or, on a busy machine, processor time."""
    if is_busy:
        return _or_inf(candidate.cpu_ratio)
    if objective.goal == "throughput":
        return 1 / candidate.throughput_per_s if candidate.throughput_per_s else math.inf
    return _or_inf(candidate.latency_ratio)


def _reason(
    winner: Candidate, eligible: Sequence[Candidate], objective: Objective, *, drop_count: int, is_busy: bool
) -> str:
    superlative = {"latency": "lowest", "throughput": "most", "size": "smallest"}[objective.goal]
    figure = figure_of(winner, objective, is_busy=is_busy)
    if is_busy and objective.goal != "size":
        superlative = "lowest"
        figure += f" (latency was {BUSY_MACHINE})"
    condition = f"passed {'its' if len(eligible) == 1 else 'their'} gates"
    if any(candidate.outcome == "warn" for candidate in eligible):
        condition = "passed or only warned"
    if objective.has_budget:
        condition += " and kept to the budget"
    drop_note = f" ({drop_count} dropped)" if drop_count else ""
    if len(eligible) == 1:
        return f"{winner.label}: {figure}, the only candidate that {condition}{drop_note}"
    rank = f"the {superlative} of {len(eligible)} that {condition}"
    if objective.goal != "size" and any(
        cost_of(candidate, objective, is_busy=is_busy) < cost_of(winner, objective, is_busy=is_busy)
        for candidate in eligible
    ):
        rank = f"within 2 % of {rank}, and the most accurate of those"
    return f"{winner.label}: {figure}, {rank}{drop_note}"


def figure_of(candidate: Candidate, objective: Objective, *, is_busy: bool) -> str:
    """Return the number that the goal compares, in words."""
    if objective.goal == "size":
        return megabytes(candidate.size_bytes or 0)
    if is_busy:
        return f"{fraction(_or_inf(candidate.cpu_ratio))} of eager's processor time"
    if objective.goal == "throughput":
        return f"{candidate.throughput_per_s or 0.0:.0f} {candidate.throughput_unit} per second"
    return f"{fraction(_or_inf(candidate.latency_ratio))} of eager's latency"


def _or_inf(value: float | None) -> float:
    return math.inf if value is None else value
