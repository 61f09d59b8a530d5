"""Choosing among candidates: which are dropped and why, which one wins, which are on the Pareto front."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from compileflow.selection.candidates import Candidate
from compileflow.spec import Objective
from compileflow.validation.report import megabytes, percent

# Latencies this close, as a share, are not told apart from one run to the next.
SAME_LATENCY = 0.02

_OUTCOME_KINDS = {
    "warn": "only warned, which is not allowed",
    "fail": "failed their gates",
    "error": "ended in an error",
    "unavailable": "cannot be compiled here",
}


@dataclass(frozen=True)
class Drop:
    """Why a candidate cannot be chosen: in words that can be counted, and in its own."""

    kind: str
    detail: str


def drops(candidates: Sequence[Candidate], objective: Objective, *, allow_warn: bool) -> dict[int, Drop]:
    """Return the candidates that cannot be chosen, by position.

    A number that was not measured keeps to no budget, and speeds are compared only among candidates that were
    timed at the same shapes.
    """
    found: dict[int, Drop] = {}
    for position, candidate in enumerate(candidates):
        drop = _outcome_drop(candidate, allow_warn) or _budget_drop(candidate, objective)
        if drop is not None:
            found[position] = drop
    if objective.goal == "size":
        return found
    shapes = {n: {each.shape for each in c.latencies} for n, c in enumerate(candidates) if n not in found}
    wanted = {shape for each in shapes.values() for shape in each}
    for position, timed in shapes.items():
        if not timed or timed != wanted:
            detail = f"not timed at {', '.join(sorted(wanted - timed)) or 'any shape'}"
            found[position] = Drop("lacked a timing", detail)
    return found


def choose(candidates: Sequence[Candidate], objective: Objective, *, allow_warn: bool) -> tuple[int | None, str]:
    """Choose the candidate that serves the objective best.

    Those that failed their gates, warned where that is not allowed, or exceed a budget are dropped. Of the
    rest, the best by the goal wins; for size, latency decides between equals. Where others are within 2 % of
    the best speed, the one of them with the smallest accuracy loss wins, then the faster, then the label that
    sorts first.

    Returns:
        The winner's position, None where none is left, and the reason in one line.
    """
    if not candidates:
        return None, "There is no candidate."
    dropped = drops(candidates, objective, allow_warn=allow_warn)
    left = [position for position in range(len(candidates)) if position not in dropped]
    if not left:
        counts = Counter(drop.kind for drop in dropped.values())
        whys = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
        details = {drop.detail for drop in dropped.values()}
        shared = f": {details.pop()}" if len(details) == 1 and len(dropped) > 1 else "."
        return None, f"None of {len(candidates)} candidates is left: {whys}{shared}"
    pool = left
    if objective.goal == "size":
        smallest = min(_or_inf(candidates[position].size_bytes) for position in left)
        pool = [position for position in left if candidates[position].size_bytes == smallest]
    costs = {position: _cost(candidates[position], objective) for position in pool}
    most = min(costs.values()) * (1 + SAME_LATENCY)
    winner = min(
        (position for position in pool if costs[position] <= most),
        key=lambda n: (_or_inf(candidates[n].accuracy_loss), costs[n], candidates[n].label, n),
    )
    return winner, _why(candidates[winner], [candidates[n] for n in left], objective, dropped=len(dropped))


def pareto_front(candidates: Sequence[Candidate]) -> set[int]:
    """Return the candidates that no other beats in latency, accuracy loss and size at once.

    Only those that passed or warned and have all three numbers; lower is better in each.
    """
    points = {}
    for position, candidate in enumerate(candidates):
        point = (candidate.latency_ratio, candidate.accuracy_loss, candidate.size_bytes)
        if candidate.outcome in ("pass", "warn") and None not in point:
            points[position] = tuple(_or_inf(value) for value in point)

    def beaten(point: tuple[float, ...]) -> bool:
        return any(
            other != point and all(a <= b for a, b in zip(other, point, strict=True)) for other in points.values()
        )

    return {position for position, point in points.items() if not beaten(point)}


def _outcome_drop(candidate: Candidate, allow_warn: bool) -> Drop | None:
    if candidate.outcome == "pass" or (candidate.outcome == "warn" and allow_warn):
        return None
    allowed = "a warning is not allowed: " if candidate.outcome == "warn" else ""
    return Drop(
        _OUTCOME_KINDS[candidate.outcome], allowed + candidate.reason.removeprefix(f"{candidate.outcome}: ")
    )


def _budget_drop(candidate: Candidate, objective: Objective) -> Drop | None:
    loss, most = candidate.accuracy_loss, objective.max_accuracy_loss
    if most is not None and (loss is None or loss > most):
        measured = "unknown" if loss is None else percent(loss)
        return Drop(
            "exceeded the accuracy budget", f"accuracy loss {measured}, at most {percent(most)} is allowed"
        )
    for kind, size, limit in (
        ("serving memory", candidate.serving_memory_bytes, objective.max_serving_memory_bytes),
        ("size", candidate.size_bytes, objective.max_size_bytes),
    ):
        if limit is not None and (size is None or size > limit):
            measured = "unknown" if size is None else megabytes(size)
            return Drop(f"exceeded the {kind} budget", f"{kind} {measured}, at most {megabytes(limit)} is allowed")
    if objective.goal == "size" and candidate.size_bytes is None:
        return Drop("had no size", "its size is unknown")
    return None


def _cost(candidate: Candidate, objective: Objective) -> float:
    if objective.goal == "throughput":
        return 1 / candidate.throughput_per_s if candidate.throughput_per_s else math.inf
    return _or_inf(candidate.latency_ratio)


def _why(winner: Candidate, left: Sequence[Candidate], objective: Objective, *, dropped: int) -> str:
    best, measured = {
        "latency": ("lowest", f"{_or_inf(winner.latency_ratio):.2f} of eager's latency"),
        "throughput": ("most", f"{winner.throughput_per_s or 0.0:.0f} rows a second"),
        "size": ("smallest", megabytes(winner.size_bytes or 0)),
    }[objective.goal]
    passed = f"passed {'its' if len(left) == 1 else 'their'} gates"
    if any(each.outcome == "warn" for each in left):
        passed = "passed or only warned"
    kept = " and kept to the budget" if objective.has_budget else ""
    rest = f" ({dropped} dropped)" if dropped else ""
    if len(left) == 1:
        return f"{winner.label}: {measured}, the only one that {passed}{kept}{rest}"
    among = f"the {best} of {len(left)} that {passed}{kept}"
    if objective.goal != "size" and any(_cost(each, objective) < _cost(winner, objective) for each in left):
        among = f"within 2 % of {among}, and the most accurate there"
    return f"{winner.label}: {measured}, {among}{rest}"


def _or_inf(value: float | None) -> float:
    return math.inf if value is None else value
