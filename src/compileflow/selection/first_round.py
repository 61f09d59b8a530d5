"""The first round of target auto: which candidate is validated next, and which need no validation, and why.

Candidates are validated in the order of their expected rank. The search ends when no other one can win.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from compileflow.errors import MeasurementError
from compileflow.selection.candidates import (
    UNVALIDATED,
    Candidate,
    CandidateLatency,
    accuracy_loss_of,
)
from compileflow.selection.choice import cost_of, drops, figure_of, known_excess
from compileflow.spec import Objective
from compileflow.steps.request import CompileRequest
from compileflow.steps.trial import Trial
from compileflow.steps.values import CompiledArtifact

# A candidate that is so many times slower in the first round cannot win. Few calls are timed there. A race times
# more calls, of all candidates in turn.
_SLOWER, _SLOWER_IN_RACE = 1.3, 1.05
# The same for processor times on a busy machine, where they vary more from one timing to the next.
_SLOWER_WHEN_BUSY = 1.5
# The first round takes about as long as a validation.
FEWEST = 3


def tried_candidate(request: CompileRequest, artifact: CompiledArtifact, trial: Trial | None) -> Candidate:
    """Return a compiled candidate with the figures of its trial; its reason is a verdict that is already certain.

    Args:
        request: Request of the candidate.
        artifact: Artifact of the candidate.
        trial: Trial of the artifact; None without a first round.
    """
    trial = trial or Trial()
    is_refused = trial.outcome == "fail" or (trial.outcome == "warn" and not request.allow_warn)
    return Candidate(
        target=request.target,
        precision=request.precision,
        options=dict(request.target_options),
        outcome=UNVALIDATED,
        reason=trial.reason if is_refused else "",
        latencies=tuple(CandidateLatency.of(latency) for latency in trial.latencies),
        accuracy_loss=_accuracy_loss(trial),
        rel_l2=trial.figures.get("rel_l2"),
        size_bytes=artifact.size_bytes,
        compile_duration_s=artifact.compile_duration_s,
        artifact_uri=artifact.uri,
        cached=artifact.cached,
    )


def next_to_validate(
    tried: Sequence[Candidate],
    validated: Mapping[int, Candidate],
    objective: Objective,
    *,
    allow_warn: bool,
    raced: Collection[int] = (),
) -> int | None:
    """Return the position of the candidate that is validated next; None if no other one can win.

    Args:
        tried: All candidates with the figures of the first round.
        validated: The candidates that were validated, by position.
        objective: Criterion of the choice.
        allow_warn: Whether a candidate with the verdict warn can be chosen.
        raced: Positions of the candidates whose latencies are those of a race.
    """
    reasons = unpromising(tried, validated, objective, allow_warn=allow_warn, raced=raced)
    waiting = [position for position in _waiting(tried, validated) if position not in reasons]
    is_busy = any(tried[position].is_busy for position in waiting)

    def rank(position: int) -> tuple[bool, float, float, int]:
        candidate = tried[position]
        size = _size(candidate) if objective.goal == "size" else 0.0
        return bool(candidate.reason), size, cost_of(candidate, objective, is_busy=is_busy), position

    return min(waiting, key=rank, default=None)


def unpromising(
    tried: Sequence[Candidate],
    validated: Mapping[int, Candidate],
    objective: Objective,
    *,
    allow_warn: bool,
    raced: Collection[int] = (),
) -> dict[int, str]:
    """Return the candidates that need no validation, by position, with the reason.

    A number beyond a budget is a reason of its own. Every other reason needs a validated candidate that can be
    chosen. Then a candidate that is sure to be refused is left out, and so is one that is clearly slower, or
    larger if the goal is size. A candidate that was not timed is not slower.

    Args:
        tried: All candidates with the figures of the first round.
        validated: The candidates that were validated, by position.
        objective: Criterion of the choice.
        allow_warn: Whether a candidate with the verdict warn can be chosen.
        raced: Positions of the candidates whose latencies are those of a race.
    """
    rivals = choosable(validated, objective, allow_warn=allow_warn)
    reasons = {}
    for position in _waiting(tried, validated):
        candidate = tried[position]
        if excess := known_excess(candidate, objective):
            reasons[position] = excess.detail
        elif rivals and candidate.reason:
            reasons[position] = f"it cannot win: the first round shows the verdict {candidate.reason}"
        elif position in raced and (among := [tried[rival] for rival in rivals if rival in raced]):
            reasons[position] = _why_beaten(candidate, among, objective, "a race", _SLOWER_IN_RACE)
        elif rivals:
            among = [tried[rival] for rival in rivals]
            reasons[position] = _why_beaten(candidate, among, objective, "the first round", _SLOWER)
    return {position: reason for position, reason in reasons.items() if reason}


def choosable(validated: Mapping[int, Candidate], objective: Objective, *, allow_warn: bool) -> list[int]:
    """Return the positions of the validated candidates that can be chosen."""
    dropped = drops(list(validated.values()), objective, allow_warn=allow_warn)
    return [position for number, position in enumerate(validated) if number not in dropped]


def _why_beaten(
    candidate: Candidate, rivals: Sequence[Candidate], objective: Objective, timing: str, slower: float
) -> str:
    """Return why a candidate cannot win against candidates that can be chosen; "" if it may win."""
    is_busy = any(rival.is_busy for rival in (candidate, *rivals))
    slower = _SLOWER_WHEN_BUSY if is_busy else slower

    def place(rival: Candidate) -> tuple[float, float]:
        size = _size(rival) if objective.goal == "size" else 0.0
        return size, cost_of(rival, objective, is_busy=is_busy)

    best = min(rivals, key=place)
    (size, cost), (best_size, best_cost) = place(candidate), place(best)
    is_slower = size == best_size and math.isfinite(cost) and cost > slower * best_cost
    if not (size > best_size or is_slower):
        return ""
    goal = Objective() if is_slower and objective.goal == "size" else objective
    figure, best_figure = (figure_of(each, goal, is_busy=is_busy) for each in (candidate, best))
    return f"it cannot win: {figure} in {timing}, and {best.label}, which can be chosen, has {best_figure}"


def _accuracy_loss(trial: Trial) -> float | None:
    """Return the share of decisions that changed; None if the artifact answered no example."""
    try:
        return accuracy_loss_of(trial.figures)
    except MeasurementError:
        return None


def _waiting(tried: Sequence[Candidate], validated: Mapping[int, Candidate]) -> list[int]:
    return [
        position
        for position, candidate in enumerate(tried)
        if candidate.outcome == UNVALIDATED and position not in validated
    ]


def _size(candidate: Candidate) -> float:
    return math.inf if candidate.size_bytes is None else float(candidate.size_bytes)
