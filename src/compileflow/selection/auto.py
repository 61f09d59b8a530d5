"""Target auto: plan the candidates that can compile and run here, and compare their results.

`choice.py` chooses the winner.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from compileflow._process.folders import work_folder
from compileflow.catalog import get_target, open_store, target_names
from compileflow.contracts import Target
from compileflow.errors import CompileflowError, SpecError, TargetUnavailableError
from compileflow.selection.candidates import Candidate, CandidateLatency, accuracy_loss_of
from compileflow.selection.choice import choose, drops
from compileflow.selection.comparison import Comparison, write_comparison
from compileflow.settings import Settings
from compileflow.spec import HfTask, Precision
from compileflow.steps.compile import check_examples, check_modules, detect_task, timed_shapes
from compileflow.steps.race import race
from compileflow.steps.report_file import read_report
from compileflow.steps.request import AUTO, CompileRequest
from compileflow.steps.source_checks import check_lengths, check_source
from compileflow.steps.values import CompiledArtifact, FetchedSource, ValidatedArtifact
from compileflow.validation.report import environment

logger = logging.getLogger(__name__)
# Memory of all candidates that take part in a race.
_MOST_RACE_BYTES = 4 * 2**30


class CandidatePlan(BaseModel):
    """The candidates of target auto: those to try, and those that this machine cannot try.

    Attributes:
        hf_task: Task from the request, or detected from the source model.
        requests: One request per candidate, in the order of trying.
        unavailable: Candidates that this machine cannot compile or run, with the reason.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    hf_task: HfTask
    requests: tuple[CompileRequest, ...]
    unavailable: tuple[Candidate, ...]


class ComparedCandidates(BaseModel):
    """The stored comparison, and the position of the winner."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    comparison_uri: str
    comparison_digest: str
    winner: int | None = Field(
        description="Position of the winner among the candidates, or None if every candidate was dropped."
    )
    reason: str


def check_auto(request: CompileRequest) -> None:
    """Check a request for target auto before its run.

    Raises:
        SpecError: The request contradicts itself.
        TargetUnavailableError: None of its targets compiles and runs on this machine.
    """
    reasons = []
    for name in _requested_targets(request):
        availability = get_target(name).probe()
        if availability.can_compile and availability.can_run:
            return
        reasons.append(f"{name}: {availability.reason}")
    raise TargetUnavailableError(
        f"None of the requested targets compiles and runs here: {'; '.join(reasons)}.",
        hint="Run: compileflow targets, which says how to install each one.",
    )


def plan_candidates(
    source: FetchedSource, request: CompileRequest, *, store_uri: str, settings: Settings
) -> CandidatePlan:
    """Turn a request for target auto into one request per target, precision and set of options.

    Args:
        source: Source model.
        request: Request for target auto.
        store_uri: Artifact store that holds the source model.
        settings: Credentials of the store.

    Raises:
        SpecError: The request contradicts itself or does not suit the model, the examples cannot be used, the
            model has modules that cannot be served, or none of the requested targets has the task.
        SourceError: transformers does not know the model, or files of it are missing.
    """
    names = _requested_targets(request)
    with open_store(store_uri, settings).open_folder(source.digest) as folder:
        hf_task = request.hf_task or source.hf_task or detect_task(folder)
        check_modules(hf_task, folder)
        spec = request.spec_for(hf_task)
        check_source(folder, spec)
        check_lengths(folder, spec, None, timed_shapes=timed_shapes(request))
        validation = request.validation
        if request.steps.validate and validation.examples_path is not None:
            # The compile of each candidate says what validation ignores.
            check_examples(hf_task, validation.examples_path, validation.max_examples, folder, lambda _: None)
    requests: list[CompileRequest] = []
    unavailable_candidates: list[Candidate] = []
    for name in names:
        target = get_target(name)
        if hf_task not in target.capabilities.hf_tasks:
            continue
        supported_precisions = target.capabilities.precisions_for(hf_task)
        requested_precisions = request.auto.precisions or supported_precisions
        precisions = [precision for precision in supported_precisions if precision in requested_precisions]
        availability = target.probe()
        if precisions and not (availability.can_compile and availability.can_run):
            reason = "; ".join(part for part in (availability.reason, availability.hint) if part)
            unavailable_candidates.append(_unavailable(name, precisions[0], reason))
            continue
        for precision in precisions:
            if precision in availability.lacking:
                unavailable_candidates.append(_unavailable(name, precision, availability.lacking[precision]))
                continue
            for options in target.capabilities.variants.get(precision, ({},)):
                if not _suit(target, options, hf_task, precision):
                    continue
                update = {"target": name, "precision": precision, "target_options": dict(options)}
                requests.append(request.model_copy(update=update | {"hf_task": hf_task}))
    if not requests and not unavailable_candidates:
        raise SpecError(
            f"None of the requested targets compiles {hf_task.value} in a requested precision.",
            hint="Allow more targets or precisions for auto.",
        )
    return CandidatePlan(hf_task=hf_task, requests=tuple(requests), unavailable=tuple(unavailable_candidates))


def _suit(target: Target, options: Mapping[str, JsonValue], hf_task: HfTask, precision: Precision) -> bool:
    """Return whether a target has options of its own list for a task; some are for other tasks."""
    try:
        target.Options.model_validate(options).check_task(hf_task, precision)
    except SpecError:
        return False
    return True


def measured_candidate(
    request: CompileRequest, artifact: CompiledArtifact, validated: ValidatedArtifact, settings: Settings
) -> Candidate:
    """Return the candidate of a validated artifact, with the latencies of its report."""
    report = read_report(validated.report_uri, settings)
    memory = validated.figures.get("serving_memory_bytes")
    return Candidate(
        target=request.target,
        precision=request.precision,
        options=dict(request.target_options),
        outcome=validated.outcome,
        reason=validated.reason,
        latencies=tuple(CandidateLatency.of(latency) for latency in report.latencies),
        accuracy_loss=accuracy_loss_of(validated.figures),
        rel_l2=validated.figures.get("rel_l2"),
        size_bytes=artifact.size_bytes,
        serving_memory_bytes=None if memory is None else int(memory),
        compile_duration_s=artifact.compile_duration_s,
        artifact_uri=artifact.uri,
        report_uri=validated.report_uri,
        cached=artifact.cached,
    )


def failed_candidate(
    request: CompileRequest, error: CompileflowError, artifact: CompiledArtifact | None = None
) -> Candidate:
    """Return a candidate without a verdict, with the error as the reason."""
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

    The candidates that can be chosen are timed once more, in turn, with one common source model.

    Args:
        source: Source model.
        request: Request for target auto, with its objective.
        plan: Plan with the requests; the comparison also lists its unavailable candidates.
        candidates: One result per request of the plan, in the plan's order.
        store_uri: Artifact store that gets the comparison.
        settings: Work folder and threads.
    """
    dropped = drops(candidates, request.auto.objective, allow_warn=request.allow_warn)
    rivals = [position for position in range(len(candidates)) if position not in dropped]
    candidates = raced_candidates(source, request, candidates, rivals, store_uri=store_uri, settings=settings)
    all_candidates = (*candidates, *plan.unavailable)
    winner, reason = choose(all_candidates, request.auto.objective, allow_warn=request.allow_warn)
    comparison = Comparison(
        source_uri=source.uri,
        source_revision=source.revision,
        source_digest=source.digest,
        hf_task=plan.hf_task,
        objective=request.auto.objective,
        allow_warn=request.allow_warn,
        candidates=all_candidates,
        winner=winner,
        reason=reason,
        environment=environment(settings.threads),
    )
    with work_folder(settings.work_dir, label=AUTO) as work:
        (work / "comparison").mkdir()
        write_comparison(comparison, work / "comparison")
        stored_folder = open_store(store_uri, settings).put_folder(work / "comparison")
    return ComparedCandidates(
        comparison_uri=stored_folder.uri, comparison_digest=stored_folder.digest, winner=winner, reason=reason
    )


def raced_candidates(
    source: FetchedSource,
    request: CompileRequest,
    candidates: Sequence[Candidate],
    rivals: Sequence[int],
    *,
    store_uri: str,
    settings: Settings,
) -> Sequence[Candidate]:
    """Return the candidates, some with the latencies of a race.

    Args:
        source: Source model.
        request: Request for target auto.
        candidates: All candidates.
        rivals: Positions of the candidates to time in turn. The slowest do not take part if all together need too
            much memory. If the race is disturbed or fails, all latencies stay.
        store_uri: Artifact store of the candidates.
        settings: Work folder and threads.
    """
    rivals = sorted(
        rivals,
        key=lambda position: candidates[position].latency_ratio or candidates[position].cpu_ratio or math.inf,
    )
    # All of them are in memory at once; the fastest come first.
    memory_bytes = accumulate(_memory_bytes(candidates[position]) for position in rivals)
    rivals = [position for position, total in zip(rivals, memory_bytes, strict=True) if total <= _MOST_RACE_BYTES]
    if request.auto.objective.goal == "size" or len(rivals) < 2:
        return candidates
    logger.info("timing %d candidates in turn", len(rivals))
    uris = [str(candidates[position].artifact_uri) for position in rivals]
    try:
        result = race(source, uris, request, store_uri=store_uri, settings=settings)
    except CompileflowError as error:
        logger.warning("The race failed, so the earlier latencies count: %s", error.message)
        return candidates
    if result.busy:
        logger.warning("The race was disturbed, so the earlier latencies count: %s", result.busy)
        return candidates
    raced = list(candidates)
    for position, latencies in zip(rivals, result.latencies, strict=True):
        # The race has no processor time with one thread.
        cpu_ratios = {latency.shape: latency.cpu_ratio for latency in candidates[position].latencies}
        timings = tuple(
            CandidateLatency.of(latency).model_copy(update={"cpu_ratio": cpu_ratios.get(latency.shape)})
            for latency in latencies
        )
        raced[position] = candidates[position].model_copy(update={"latencies": timings})
    return raced


def _memory_bytes(candidate: Candidate) -> int:
    """Return the serving memory of a candidate; before its validation an estimate, for weights that are copied."""
    return candidate.serving_memory_bytes or 2 * (candidate.size_bytes or 0)


def _requested_targets(request: CompileRequest) -> Sequence[str]:
    if request.target_options:
        raise SpecError(
            f"Target {AUTO!r} takes no target options, got {', '.join(request.target_options)}.",
            hint="Name the target that the options are for.",
        )
    if not request.steps.validate:
        raise SpecError(
            f"Target {AUTO!r} chooses by what validation measures, and the validate step is off.",
            hint="Switch the validate step on, or name a target.",
        )
    names = request.auto.targets or target_names()
    unknown_names = sorted(set(names) - set(target_names()))
    if unknown_names:
        raise SpecError(
            f"Unknown target {unknown_names[0]!r}.", hint=f"Choose among: {', '.join(target_names())}."
        )
    return names


def _unavailable(target: str, precision: Precision, reason: str) -> Candidate:
    return Candidate(target=target, precision=precision, outcome="unavailable", reason=reason)
