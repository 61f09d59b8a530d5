"""The search of target auto: compile all candidates, try them in a first round, validate those that can win."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from compileflow.errors import CompileflowError, VerdictError
from compileflow.selection.auto import ComparedCandidates, failed_candidate, measured_candidate
from compileflow.selection.candidates import Candidate
from compileflow.selection.first_round import FEWEST, choosable, next_to_validate, tried_candidate, unpromising
from compileflow.settings import Settings
from compileflow.steps.request import CompileRequest
from compileflow.steps.trial import Trial
from compileflow.steps.values import CompiledArtifact, ValidatedArtifact

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProvenCandidate:
    """A candidate of target auto that has an artifact and a verdict."""

    request: CompileRequest
    artifact: CompiledArtifact
    validated: ValidatedArtifact


class SearchSteps(Protocol):
    """The steps that a search makes, in this process or as tasks of a flow. They return their errors."""

    def compile(self, request: CompileRequest) -> CompiledArtifact | CompileflowError:
        """Compile a candidate."""

    def try_all(self, artifacts: Sequence[CompiledArtifact]) -> Sequence[Trial] | CompileflowError:
        """Try all artifacts in the first round."""

    def race(self, candidates: Sequence[Candidate], rivals: Sequence[int]) -> Sequence[Candidate]:
        """Time some candidates in turn, as `raced_candidates`."""

    def validate(
        self, request: CompileRequest, artifact: CompiledArtifact
    ) -> ValidatedArtifact | CompileflowError:
        """Validate a candidate."""


@dataclass(frozen=True)
class Search:
    """The outcome of a search.

    Attributes:
        candidates: All candidates, in the order of the requests.
        proven: Candidates that were validated, by position.
    """

    candidates: Sequence[Candidate]
    proven: Mapping[int, ProvenCandidate]

    def winner(self, comparison: ComparedCandidates) -> ProvenCandidate:
        """Return the candidate that the comparison chose.

        Raises:
            VerdictError: No candidate is good enough; the message says why.
        """
        winner = None if comparison.winner is None else self.proven.get(comparison.winner)
        if winner is None:
            raise VerdictError(
                comparison.reason,
                hint=f"Nothing was registered. Run: compileflow inspect {comparison.comparison_uri}",
                report_uri=comparison.comparison_uri,
            )
        return winner


def search(
    request: CompileRequest,
    requests: Sequence[CompileRequest],
    steps: SearchSteps,
    settings: Settings,
    *,
    show: Callable[[float, str], None],
) -> Search:
    """Compile every candidate, try them in a first round, and validate those that can win.

    Args:
        request: Request for target auto.
        requests: Requests of the candidates.
        steps: Makes the steps.
        settings: Credentials of the store.
        show: Called with the share of the search that is done, 0 to 1, and a line about what begins.
    """
    tried, artifacts = _tried(requests, steps, show)
    objective, allow_warn = request.auto.objective, request.allow_warn
    proven: dict[int, ProvenCandidate] = {}
    validated: dict[int, Candidate] = {}
    raced: set[int] = set()
    is_race_due = len(artifacts) >= FEWEST
    began = time.monotonic()

    def left_out(verdicts: Mapping[int, Candidate]) -> dict[int, str]:
        return unpromising(tried, verdicts, objective, allow_warn=allow_warn, raced=raced)

    while True:
        position = next_to_validate(tried, validated, objective, allow_warn=allow_warn, raced=raced)
        if position is None:
            break
        rivals = choosable(validated, objective, allow_warn=allow_warn)
        if rivals and is_race_due:
            # It tells close candidates apart, and takes less time than a validation.
            is_race_due = False
            beaten = left_out(validated)
            rivals += [place for place in artifacts if place not in beaten and place not in validated]
            show(0.5 + 0.5 * len(validated) / len(artifacts), f"time {len(rivals)} candidates in turn")
            timed = steps.race(tried, rivals)
            raced = {place for place in rivals if timed[place].latencies != tried[place].latencies}
            tried = list(timed)
            continue
        if_it_passes = validated | {position: tried[position].model_copy(update={"outcome": "pass"})}
        done, left = len(validated), len(artifacts) - len(validated) - len(left_out(if_it_passes))
        words = f"validate {done + 1} of about {done + left}: {label(requests[position])}"
        show(0.5 + 0.5 * done / (done + left), words + time_left(done, left, time.monotonic() - began))
        candidate, artifact = requests[position], artifacts[position]
        outcome = steps.validate(candidate, artifact)
        if isinstance(outcome, CompileflowError):
            validated[position] = failed_candidate(candidate, outcome, artifact)
        else:
            validated[position] = measured_candidate(candidate, artifact, outcome, settings)
            proven[position] = ProvenCandidate(candidate, artifact, outcome)
    for position, reason in left_out(validated).items():
        tried[position] = tried[position].model_copy(update={"reason": reason})
    for position in raced & set(validated):
        # Beside those that were left out, the latencies of the race are comparable.
        update = {"latencies": tried[position].latencies}
        validated[position] = validated[position].model_copy(update=update)
    candidates = [validated.get(position, candidate) for position, candidate in enumerate(tried)]
    return Search(candidates, proven)


def _tried(
    requests: Sequence[CompileRequest], steps: SearchSteps, show: Callable[[float, str], None]
) -> tuple[list[Candidate], dict[int, CompiledArtifact]]:
    """Compile every candidate and try them; return all candidates, and the artifacts by position."""
    artifacts: dict[int, CompiledArtifact] = {}
    errors: dict[int, CompileflowError] = {}
    began = time.monotonic()
    for position, candidate in enumerate(requests):
        left = time_left(position, len(requests) - position, time.monotonic() - began)
        words = f"compile {position + 1} of {len(requests)}: {label(candidate)}{left}"
        show(0.5 * position / len(requests), words)
        compiled = steps.compile(candidate)
        if isinstance(compiled, CompileflowError):
            errors[position] = compiled
        else:
            artifacts[position] = compiled
    trials: dict[int, Trial] = {}
    if len(artifacts) >= FEWEST:
        show(0.5, f"first round of {len(artifacts)} candidates")
        outcome = steps.try_all(list(artifacts.values()))
        if isinstance(outcome, CompileflowError):
            logger.warning("The first round failed, so every candidate is validated: %s", outcome.message)
        else:
            trials = dict(zip(artifacts, outcome, strict=True))
    tried = [
        failed_candidate(candidate, errors[position])
        if position in errors
        else tried_candidate(candidate, artifacts[position], trials.get(position))
        for position, candidate in enumerate(requests)
    ]
    return tried, artifacts


def time_left(done: int, left: int, elapsed_s: float) -> str:
    """Return about how long the rest takes, as the end of a line; "" if nothing is done.

    Args:
        done: Number of candidates that are done.
        left: Number of those that are left, with the one that begins.
        elapsed_s: Seconds that those before it took.
    """
    if not done:
        return ""
    left_s = elapsed_s / done * left
    return f", about {left_s:.0f} s left" if left_s < 90 else f", about {left_s / 60:.0f} min left"


def label(request: CompileRequest) -> str:
    """Return the target, the precision and the options of a candidate."""
    options = (f"{name}={value}" for name, value in request.target_options.items())
    return " ".join((request.target, request.precision.value, *options))
