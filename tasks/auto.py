"""plan, first round and compare: list the candidates of target auto, try them, and choose one."""

from __future__ import annotations

from collections.abc import Sequence

from prefect import get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from compileflow.selection.auto import (
    CandidatePlan,
    ComparedCandidates,
    compare_candidates,
    plan_candidates,
    raced_candidates,
)
from compileflow.selection.candidates import Candidate
from compileflow.selection.comparison_file import read_comparison
from compileflow.steps.request import CompileRequest
from compileflow.steps.trial import Trial, try_compiled
from compileflow.steps.values import CompiledArtifact, FetchedSource
from tasks.policies import RETRIES, prefect_key
from tasks.server import patiently
from tasks.settings import settings_for


@task(name="plan", description="List the targets and precisions to try on this machine.", cache_policy=NO_CACHE)
def plan(source: FetchedSource, request: CompileRequest) -> CandidatePlan:
    """Return the candidates and the targets that this machine cannot try."""
    settings = settings_for(request)
    candidate_plan = plan_candidates(
        source, request, store_uri=settings.resolved_store_uri(request.store_uri), settings=settings
    )
    names = ", ".join(dict.fromkeys(candidate.target for candidate in candidate_plan.requests))
    get_run_logger().info("%d candidates: %s", len(candidate_plan.requests), names or "none")
    return candidate_plan


@task(name="first round", description="Try all candidates, to validate only those that can win.", **RETRIES)
def first_round(
    source: FetchedSource, artifacts: list[CompiledArtifact], request: CompileRequest
) -> tuple[Trial, ...]:
    """Return the trial of each artifact."""
    settings = settings_for(request)
    return try_compiled(
        source,
        artifacts,
        request,
        store_uri=settings.resolved_store_uri(request.store_uri),
        settings=settings,
        on_progress=get_run_logger().info,
    )


@task(name="time in turn", description="Time close candidates in one process.", cache_policy=NO_CACHE)
def time_in_turn(
    source: FetchedSource, request: CompileRequest, candidates: list[Candidate], rivals: list[int]
) -> Sequence[Candidate]:
    """Return all candidates, those at the positions of the rivals with their new latencies."""
    settings = settings_for(request)
    return raced_candidates(
        source,
        request,
        candidates,
        rivals,
        store_uri=settings.resolved_store_uri(request.store_uri),
        settings=settings,
    )


@task(name="compare", description="Choose one of the candidates, and show all.", cache_policy=NO_CACHE)
def compare(
    source: FetchedSource, request: CompileRequest, candidate_plan: CandidatePlan, candidates: list[Candidate]
) -> ComparedCandidates:
    """Return the stored comparison and its winner, and create a Prefect artifact with the table."""
    settings = settings_for(request)
    outcome = compare_candidates(
        source,
        request,
        candidate_plan,
        candidates,
        store_uri=settings.resolved_store_uri(request.store_uri),
        settings=settings,
    )
    comparison = read_comparison(outcome.comparison_uri, settings)
    header = comparison.comparison_header()
    patiently(
        create_table_artifact,
        [dict(zip(header, row, strict=True)) for row in comparison.comparison_rows()],
        key=prefect_key(request.name, source.uri, "comparison"),
        description=outcome.reason,
    )
    get_run_logger().info(outcome.reason)
    return outcome
