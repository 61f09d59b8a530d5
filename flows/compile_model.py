"""compile_model: fetch, compile, validate and register one source model, for one target or for the best of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefect.client.schemas.objects import State
from prefect.runtime import deployment, flow_run
from prefect.states import Completed, Failed

from compileflow._process.run_in_child import warm_processes
from compileflow.admin.shared_compile import SharedCompile
from compileflow.contracts import PENDING
from compileflow.errors import CompileflowError, VerdictError
from compileflow.selection.candidates import Candidate
from compileflow.selection.search import search
from compileflow.steps.register import check_verdict, default_name
from compileflow.steps.request import AUTO, CompileRequest
from compileflow.steps.run import CompileResult
from compileflow.steps.trial import Trial
from compileflow.steps.values import CompiledArtifact, FetchedSource, ValidatedArtifact
from flows.deployed_flow import deployed_flow
from flows.lateness import MaxLateness, skipped_if_late
from flows.registration import as_error, find_everywhere, register_everywhere
from tasks.auto import compare, first_round, plan, time_in_turn
from tasks.compile import compile_source
from tasks.events import announce, announce_pending
from tasks.fetch import fetch
from tasks.outcome import keep_outcome
from tasks.policies import prefect_key
from tasks.progress import RunProgress
from tasks.publish import publish
from tasks.server import patiently
from tasks.settings import settings_for
from tasks.validate import validate


def _run_name() -> str:
    request = CompileRequest.model_validate(flow_run.parameters["request"])
    return f"{request.name or default_name(request.model)} for {request.target}"


@deployed_flow(
    name="compile-model",
    description="Compile a transformers model for a target, validate the result, store it and register it.",
    flow_run_name=_run_name,
)
def compile_model(
    request: CompileRequest, max_lateness_s: MaxLateness = None, announcement: str = ""
) -> CompileResult | State[Any]:
    """Run the steps, up to the last one that is on.

    A refused artifact, like any error, ends the run as Failed with the reason.

    Args:
        request: What to compile, how to validate it and where to register it. Only the model is required.
        max_lateness_s: For schedules: a run that starts more seconds than this after its time ends as Skipped.
        announcement: Leave empty. An event of watch-registry gives it: a run ends as Skipped if another run holds
            or has finished the compile that was announced.
    """
    skipped = skipped_if_late(max_lateness_s)
    if skipped is not None:
        return skipped
    try:
        result = run_announced(request, announcement) if announcement else run_steps(request)
    except CompileflowError as error:
        hand_back(request, error)
        # The message of a verdict is complete; the hint of any other error says what to do.
        return Failed(message=error.message if isinstance(error, VerdictError) else str(error), data=error)
    if result is None:
        return Completed(name="Skipped", message="Skipped: another run holds or has finished this compile.")
    hand_back(request, result)
    announce_validated(result)
    return result


def run_announced(request: CompileRequest, announcement: str) -> CompileResult | None:
    """Run the steps of a compile that was announced; return None if another run holds or has settled it."""
    shared = SharedCompile.of(request, announcement, settings_for(request))
    with shared.held("compile") as is_ours:
        # A person who starts a failed run again wants its outcome.
        if not is_ours or (shared.is_settled() and flow_run.run_count == 1):
            return None
        try:
            result = run_steps(request)
        except CompileflowError as error:
            shared.record_failure(error)
            raise
        shared.record_compiled()
        return result


def run_steps(request: CompileRequest) -> CompileResult:
    """Fetch, compile, validate and register, up to the last step that is on."""
    progress = RunProgress(prefect_key(request.name, request.model, request.target, "progress"), "fetching")
    source = fetch.with_options(timeout_seconds=request.timeouts.fetch_s)(request).result()
    if request.steps.only_fetch:
        return CompileResult.of(request, source)
    if request.target == AUTO:
        result = compile_best(source, request, progress)
        progress.advance(100, "done")
        return result
    progress.advance(10, "compiling")
    artifact = compile_source(source, request).result()
    if not request.steps.need_verdict:
        return CompileResult.of(request, source, artifact, None, find_everywhere(source, artifact, request))
    progress.advance(50, "validating")
    validated = validate(source, artifact, request).result()
    progress.advance(90, f"verdict {validated.outcome}")
    result = finish(source, artifact, validated, request)
    progress.advance(100, f"verdict {validated.outcome}: {len(result.versions)} registered")
    return result


def hand_back(request: CompileRequest, outcome: CompileResult | CompileflowError) -> None:
    """Keep the outcome for the flow that started this run through a deployment, perhaps on another machine."""
    if deployment.id and patiently(lambda: flow_run.parent_flow_run_id):
        keep_outcome(request, outcome, flow_run.id)


def announce_validated(result: CompileResult) -> None:
    """Send an event for each version that this run registered with the verdict pass."""
    for registry_uri, version in result.versions.items():
        if version.flow_run_id == flow_run.id and version.verdict == "pass":
            # One approval is for the version in all registries, so that only the first event starts one.
            is_first = version == result.version
            label = {"compileflow.registry": "first" if is_first else "further"}
            announce("validated", version, registry_uri, labels=label, registry_uris=list(result.versions))


def compile_best(source: FetchedSource, request: CompileRequest, progress: RunProgress) -> CompileResult:
    """Compile every candidate, validate those that can win, and finish the run with the winner."""
    candidate_plan = plan(source, request)

    def show(share: float, activity: str) -> None:
        progress.advance(10 + 80 * share, activity)

    # The compiles import transformers once, the first round and the validations Great Expectations.
    with warm_processes():
        found = search(request, candidate_plan.requests, _Steps(source, request), settings_for(request), show=show)
    comparison = compare(source, request, candidate_plan, list(found.candidates))
    winner = found.winner(comparison)
    result = finish(source, winner.artifact, winner.validated, winner.request)
    return result.model_copy(update={"comparison_uri": comparison.comparison_uri})


@dataclass(frozen=True)
class _Steps:
    """The steps of a search as tasks; the error of a candidate does not end the run."""

    source: FetchedSource
    request: CompileRequest

    def compile(self, request: CompileRequest) -> CompiledArtifact | CompileflowError:
        outcome = compile_source(self.source, request, return_state=True).result(raise_on_failure=False)
        return outcome if isinstance(outcome, CompiledArtifact) else as_error(outcome)

    def try_all(self, artifacts: Sequence[CompiledArtifact]) -> Sequence[Trial] | CompileflowError:
        outcome = first_round(self.source, list(artifacts), self.request, return_state=True).result(
            raise_on_failure=False
        )
        return outcome if isinstance(outcome, tuple) else as_error(outcome)

    def race(self, candidates: Sequence[Candidate], rivals: Sequence[int]) -> Sequence[Candidate]:
        return time_in_turn(self.source, self.request, list(candidates), list(rivals))

    def validate(
        self, request: CompileRequest, artifact: CompiledArtifact
    ) -> ValidatedArtifact | CompileflowError:
        outcome = validate(self.source, artifact, request, return_state=True).result(raise_on_failure=False)
        return outcome if isinstance(outcome, ValidatedArtifact) else as_error(outcome)


def finish(
    source: FetchedSource, artifact: CompiledArtifact, validated: ValidatedArtifact, request: CompileRequest
) -> CompileResult:
    """Show the outcome in the Prefect UI, and register the artifact if its verdict allows."""
    publish(source, artifact, validated, request)
    if validated.outcome == PENDING:
        announce_pending(artifact, request.target)
    check_verdict(validated, allow_warn=request.allow_warn or not request.steps.register)
    if request.steps.register:
        versions = register_everywhere(source, artifact, validated, request)
    else:
        versions = find_everywhere(source, artifact, request)
    return CompileResult.of(request, source, artifact, validated, versions)
