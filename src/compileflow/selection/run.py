"""One run of a request in this process: for one target, or for auto, which tries several and chooses one."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass

from compileflow._process.run_in_child import warm_processes
from compileflow.errors import CompileflowError, SourceUnavailableError
from compileflow.selection.auto import check_auto, compare_candidates, plan_candidates, raced_candidates
from compileflow.selection.candidates import Candidate
from compileflow.selection.search import label, search
from compileflow.settings import Settings
from compileflow.steps.fetch import scheme_of
from compileflow.steps.preflight import check_hub_model, check_request
from compileflow.steps.request import AUTO, CompileRequest
from compileflow.steps.run import CompileResult, LoggedProgress, Progress, StepRunner, run_request
from compileflow.steps.trial import Trial, try_compiled
from compileflow.steps.values import CompiledArtifact, FetchedSource, ValidatedArtifact


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
    # The compiles import transformers once, the first round and the validations Great Expectations.
    with warm_processes(), progress.step("candidates") as show:
        found = search(
            request,
            plan.requests,
            _Steps(source, request, settings, progress, store_uri),
            settings,
            show=lambda _, line: show(line),
        )
    comparison = compare_candidates(
        source, request, plan, found.candidates, store_uri=store_uri, settings=settings
    )
    winner = found.winner(comparison)
    steps = StepRunner(winner.request, settings, progress=progress)
    versions = steps.register(source, winner.artifact, winner.validated)
    result = CompileResult.of(winner.request, source, winner.artifact, winner.validated, versions)
    return result.model_copy(update={"comparison_uri": comparison.comparison_uri})


@dataclass(frozen=True)
class _Steps:
    """The steps of a search in this process."""

    source: FetchedSource
    request: CompileRequest
    settings: Settings
    progress: Progress
    store_uri: str

    def compile(self, request: CompileRequest) -> CompiledArtifact | CompileflowError:
        try:
            return self._runner(request).compile(self.source)
        except CompileflowError as error:
            return error

    def try_all(self, artifacts: Sequence[CompiledArtifact]) -> Sequence[Trial] | CompileflowError:
        try:
            with self.progress.step("first round") as show:
                return try_compiled(
                    self.source,
                    artifacts,
                    self.request,
                    store_uri=self.store_uri,
                    settings=self.settings,
                    on_progress=show,
                )
        except CompileflowError as error:
            return error

    def race(self, candidates: Sequence[Candidate], rivals: Sequence[int]) -> Sequence[Candidate]:
        return raced_candidates(
            self.source, self.request, candidates, rivals, store_uri=self.store_uri, settings=self.settings
        )

    def validate(
        self, request: CompileRequest, artifact: CompiledArtifact
    ) -> ValidatedArtifact | CompileflowError:
        try:
            return self._runner(request).validate(self.source, artifact)
        except CompileflowError as error:
            return error

    def _runner(self, request: CompileRequest) -> StepRunner:
        return StepRunner(request, self.settings, progress=self.progress, label=label(request))
