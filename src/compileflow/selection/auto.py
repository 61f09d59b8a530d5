"""auto: every target and precision that can compile and run here, what came of each, and the one that wins."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from compileflow._process.folders import work_folder
from compileflow.catalog import get_target, open_store, target_names
from compileflow.errors import CompileflowError, SpecError, TargetUnavailableError
from compileflow.selection.candidates import Candidate, CandidateLatency, accuracy_loss_of
from compileflow.selection.comparison import Comparison, choose, write_comparison
from compileflow.settings import Settings
from compileflow.spec import HfTask, Precision
from compileflow.steps.compile import detect_task
from compileflow.steps.report_file import read_report
from compileflow.steps.request import AUTO, CompileRequest
from compileflow.steps.values import CompiledArtifact, FetchedSource, ValidatedArtifact
from compileflow.validation.report import environment


class CandidatePlan(BaseModel):
    """What `auto` tries, and what it cannot try here, with the reason.

    Attributes:
        hf_task: Asked for, or read off the source model.
        requests: One request a candidate, in the order of trying.
        unavailable: Candidates that this machine cannot compile or run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    hf_task: HfTask
    requests: tuple[CompileRequest, ...]
    unavailable: tuple[Candidate, ...]


class ComparedCandidates(BaseModel):
    """The stored comparison, and the position of the candidate that won; None when none is good enough."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    comparison_uri: str
    comparison_digest: str
    winner: int | None = Field(description="Among the candidates, in the order in which they were given.")
    reason: str


def plan_candidates(
    source: FetchedSource, request: CompileRequest, *, store_uri: str, settings: Settings
) -> CandidatePlan:
    """Turn a request for `auto` into one request for each target, precision and set of options.

    Raises:
        SpecError: the request contradicts itself, or no target that is left has the task.
    """
    if request.target_options:
        raise SpecError(
            f"Target options were given for target {AUTO!r}: {', '.join(request.target_options)}.",
            hint="Name the target that they are for.",
        )
    if not request.steps.validate:
        raise SpecError(
            f"The validate step is off, and {AUTO!r} chooses by what validation measures.",
            hint="Switch the validate step on, or name a target.",
        )
    names = request.auto.targets or target_names()
    strangers = sorted(set(names) - set(target_names()))
    if strangers:
        raise SpecError(f"Unknown target {strangers[0]!r}.", hint=f"Choose among: {', '.join(target_names())}.")
    with open_store(store_uri, settings).open_folder(source.digest) as folder:
        hf_task = request.hf_task or source.hf_task or detect_task(folder)
    requests: list[CompileRequest] = []
    unavailable: list[Candidate] = []
    for name in names:
        target = get_target(name)
        if hf_task not in target.capabilities.hf_tasks:
            continue
        wanted = request.auto.precisions or target.capabilities.precisions
        precisions = [each for each in target.capabilities.precisions if each in wanted]
        here = target.probe()
        if precisions and not (here.can_compile and here.can_run):
            why = "; ".join(part for part in (here.reason, here.hint) if part)
            unavailable.append(_unavailable(name, precisions[0], why))
            continue
        for precision in precisions:
            if precision in here.lacking:
                unavailable.append(_unavailable(name, precision, here.lacking[precision]))
                continue
            for options in target.capabilities.variants.get(precision, ({},)):
                chosen = {"target": name, "precision": precision, "target_options": dict(options)}
                requests.append(request.model_copy(update={**chosen, "hf_task": hf_task}))
    if not requests and not unavailable:
        raise SpecError(
            f"No target compiles {hf_task.value} as asked.", hint="Allow more targets or precisions for auto."
        )
    return CandidatePlan(hf_task=hf_task, requests=tuple(requests), unavailable=tuple(unavailable))


def measured_candidate(
    request: CompileRequest, artifact: CompiledArtifact, validated: ValidatedArtifact, settings: Settings
) -> Candidate:
    """Return what a validated artifact is worth, with the timings of its report."""
    report = read_report(validated.report_uri, settings)
    return Candidate(
        target=request.target,
        precision=request.precision,
        options=dict(request.target_options),
        outcome=validated.outcome,
        reason=validated.reason,
        latencies=tuple(CandidateLatency.of(each) for each in report.latencies),
        accuracy_loss=accuracy_loss_of(validated.figures),
        rel_l2=validated.figures.get("rel_l2"),
        size_bytes=artifact.size_bytes,
        serving_memory_bytes=int(validated.figures["serving_memory_bytes"]),
        compile_duration_s=artifact.compile_duration_s,
        artifact_uri=artifact.uri,
        report_uri=validated.report_uri,
        cached=artifact.cached,
    )


def failed_candidate(
    request: CompileRequest, error: CompileflowError, artifact: CompiledArtifact | None = None
) -> Candidate:
    """Return a candidate that has no verdict, with the reason."""
    return Candidate(
        target=request.target,
        precision=request.precision,
        options=dict(request.target_options),
        outcome="unavailable" if isinstance(error, TargetUnavailableError) else "error",
        reason=str(error),
        size_bytes=artifact.size_bytes if artifact else None,
        compile_duration_s=artifact.compile_duration_s if artifact else None,
        artifact_uri=artifact.uri if artifact else None,
    )


def compare_candidates(
    source: FetchedSource,
    request: CompileRequest,
    plan: CandidatePlan,
    candidates: Sequence[Candidate],
    *,
    store_uri: str,
    settings: Settings,
) -> ComparedCandidates:
    """Choose the winner by the request's objective, and store the comparison beside the artifacts.

    Args:
        source: The source model.
        request: With its objective.
        plan: What was tried; what could not be tried is shown, too.
        candidates: One for each of the plan's requests, in that order.
        store_uri: Artifact store.
        settings: Work folder and threads.
    """
    shown = (*candidates, *plan.unavailable)
    winner, reason = choose(shown, request.auto.objective, allow_warn=request.allow_warn)
    comparison = Comparison(
        source_uri=source.uri,
        source_revision=source.revision,
        source_digest=source.digest,
        hf_task=plan.hf_task,
        objective=request.auto.objective,
        allow_warn=request.allow_warn,
        candidates=shown,
        winner=winner,
        reason=reason,
        environment=environment(settings.threads),
    )
    with work_folder(settings.work_dir, label=AUTO) as work:
        (work / "comparison").mkdir()
        write_comparison(comparison, work / "comparison")
        stored = open_store(store_uri, settings).put_folder(work / "comparison")
    return ComparedCandidates(
        comparison_uri=stored.uri, comparison_digest=stored.digest, winner=winner, reason=reason
    )


def _unavailable(target: str, precision: Precision, why: str) -> Candidate:
    return Candidate(target=target, precision=precision, outcome="unavailable", reason=why)
