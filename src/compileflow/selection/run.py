"""One run of a request in this process: for one target, or for auto, which tries several and chooses one."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass

from compileflow._process.run_in_child import warm_processes
from compileflow.errors import CompileflowError, SourceUnavailableError, VerdictError
from compileflow.selection.auto import (
    ComparedCandidates,
    check_auto,
    compare_candidates,
    failed_candidate,
    measured_candidate,
    plan_candidates,
)
from compileflow.selection.candidates import Candidate
from compileflow.settings import Settings
from compileflow.steps.fetch import scheme_of
from compileflow.steps.preflight import check_hub_model, check_request
from compileflow.steps.request import AUTO, CompileRequest
from compileflow.steps.run import CompileResult, LoggedProgress, Progress, StepRunner, run_request
from compileflow.steps.values import CompiledArtifact, FetchedSource, ValidatedArtifact


@dataclass(frozen=True)
class ProvenCandidate:
    """A candidate of target auto that has an artifact and a verdict."""

    request: CompileRequest
    artifact: CompiledArtifact
    validated: ValidatedArtifact

    def candidate(self, settings: Settings) -> Candidate:
        """Return its entry in the comparison, with the timings of its report."""
        return measured_candidate(self.request, self.artifact, self.validated, settings)


@dataclass(frozen=True)
class FailedCandidate:
    """A candidate of target auto that ended in an error, after its compile if it has an artifact."""

    request: CompileRequest
    error: CompileflowError
    artifact: CompiledArtifact | None = None

    def candidate(self, settings: Settings) -> Candidate:
        """Return its entry in the comparison, with the reason."""
        return failed_candidate(self.request, self.error, self.artifact)


Attempt = ProvenCandidate | FailedCandidate


def check_any_target(request: CompileRequest, settings: Settings, *, extras: Collection[str] = ()) -> None:
    """Check a request before its run, as `check_request`; target auto needs one target that works here.

    A Hub id is looked up, because a wrong one would otherwise fail after the start of a flow, and so would a model
    that does not suit the request.

    Raises:
        CompileflowError: As `check_request`, and as the Hub answers.
        TargetUnavailableError: No target of auto compiles and runs on this machine.
    """
    check_request(request, settings, extras=extras)
    if request.target == AUTO:
        check_auto(request)
    if request.steps.fetch and scheme_of(request.model) == "hf":
        # The run repeats a request that the Hub did not answer.
        with suppress(SourceUnavailableError):
            check_hub_model(request, settings)


def run_any_target(
    request: CompileRequest, settings: Settings, *, progress: Progress | None = None
) -> CompileResult:
    """Run a request for one target as `run_request` does, or try all candidates of target auto.

    Args:
        request: A request for a target or for auto.
        settings: Default store and registries, credentials, work folder and threads.
        progress: Display of the steps; None logs them.

    Raises:
        CompileflowError: A step failed. Completed steps are cached, so that the next run resumes.
        VerdictError: The artifact did not pass its gates, or no candidate did.
    """
    if request.target != AUTO:
        return run_request(request, settings, progress=progress)
    progress = progress or LoggedProgress()
    store_uri = settings.resolved_store_uri(request.store_uri)
    source = StepRunner(request, settings, progress=progress).fetch()
    plan = plan_candidates(source, request, store_uri=store_uri, settings=settings)
    attempts: list[Attempt] = []
    began = time.monotonic()
    # The compiles import transformers once, the validations Great Expectations.
    with warm_processes(), progress.step("candidates") as show:
        for candidate in plan.requests:
            show(current_candidate(plan.requests, len(attempts), time.monotonic() - began))
            attempts.append(_attempt(candidate, source, settings, progress))
    comparison = compare_candidates(
        source,
        request,
        plan,
        [attempt.candidate(settings) for attempt in attempts],
        store_uri=store_uri,
        settings=settings,
    )
    winner = winning_candidate(attempts, comparison)
    steps = StepRunner(winner.request, settings, progress=progress)
    versions = steps.register(source, winner.artifact, winner.validated)
    result = CompileResult.of(winner.request, source, winner.artifact, winner.validated, versions)
    return result.model_copy(update={"comparison_uri": comparison.comparison_uri})


def winning_candidate(attempts: Sequence[Attempt], comparison: ComparedCandidates) -> ProvenCandidate:
    """Return the candidate that the comparison chose.

    Raises:
        VerdictError: No candidate is good enough; the message says why.
    """
    winner = attempts[comparison.winner] if comparison.winner is not None else None
    if not isinstance(winner, ProvenCandidate):
        raise VerdictError(
            comparison.reason,
            hint=f"Nothing was registered. Run: compileflow inspect {comparison.comparison_uri}",
            report_uri=comparison.comparison_uri,
        )
    return winner


def current_candidate(requests: Sequence[CompileRequest], position: int, elapsed_s: float) -> str:
    """Return one line about the candidate that begins: its number, its name, and about how long the rest takes.

    Args:
        requests: All candidates, in the order of trying.
        position: Position of the one that begins.
        elapsed_s: Seconds that those before it took.
    """
    line = f"{position + 1} of {len(requests)}: {_label(requests[position])}"
    if position == 0:
        return line
    left_s = elapsed_s / position * (len(requests) - position)
    return f"{line}, about {left_s:.0f} s left" if left_s < 90 else f"{line}, about {left_s / 60:.0f} min left"


def _attempt(request: CompileRequest, source: FetchedSource, settings: Settings, progress: Progress) -> Attempt:
    steps = StepRunner(request, settings, progress=progress, label=_label(request))
    artifact = None
    try:
        artifact = steps.compile(source)
        return ProvenCandidate(request, artifact, steps.validate(source, artifact))
    except CompileflowError as error:
        return FailedCandidate(request, error, artifact)


def _label(request: CompileRequest) -> str:
    options = (f"{name}={value}" for name, value in request.target_options.items())
    return " ".join((request.target, request.precision.value, *options))
