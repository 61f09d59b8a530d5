"""watch_registry: compile every registered source version that has no compiled version for a target."""

from __future__ import annotations

from typing import Any, Literal

from prefect import get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from compileflow.admin.watch import AnnouncementStep, MissingCompile, WatchRequest, is_missing
from compileflow.errors import CompileError, CompileflowError
from flows.deployed_flow import deployed_flow
from flows.lateness import MaxLateness, skipped_if_late
from flows.one_run import run_one
from tasks.settings import settings_for
from tasks.watch import announce_created, find_missing

Outcome = Literal["compiled", "failed", "announced", "announced again", "announced before", "left to another run"]
_ANNOUNCED: dict[AnnouncementStep, Outcome] = {
    "announce": "announced",
    "announce again": "announced again",
    "wait": "announced before",
    "give up": "failed",
}


@deployed_flow(
    name="watch-registry",
    description="Compile each registered source version that lacks a compiled version, the oldest first.",
)
def watch_registry(
    watch: WatchRequest,
    action: Literal["compile", "announce"] = "compile",
    deployment: str | None = None,
    max_lateness_s: MaxLateness = None,
) -> State[Any]:
    """Go through what is missing once. One run does each compile, however many watchers and events there are.

    Args:
        watch: Registries, targets and precisions.
        action: compile sends an event and runs compile_model for each missing version; announce only sends the
            event, for an automation that compiles.
        deployment: Deployment of compile_model whose workers compile, as FLOW/DEPLOYMENT. Empty: this process.
        max_lateness_s: For schedules: a run that starts more seconds than this after its time ends as Skipped.
    """
    skipped = skipped_if_late(max_lateness_s)
    if skipped is not None:
        return skipped
    try:
        outcomes = [handle(missing, watch, action, deployment) for missing in find_missing(watch)]
    except CompileflowError as refusal:
        return Failed(message=str(refusal), data=refusal)
    headline = ", ".join(f"{outcomes.count(kind)} {kind}" for kind in dict.fromkeys(outcomes)) or "nothing missing"
    if "failed" in outcomes:
        error = CompileError(f"{headline}.", hint="The log of this run and the failed runs say why.")
        return Failed(message=headline, data=error)
    return Completed(message=headline, data=headline)


def handle(
    missing: MissingCompile, watch: WatchRequest, action: Literal["compile", "announce"], deployment: str | None
) -> Outcome:
    """Announce what is missing, and compile it if that is the action and no other run does it."""
    if action == "announce":
        return _ANNOUNCED[announce_created(missing, watch)]
    settings = settings_for(missing.request)
    shared = missing.shared(settings)
    with shared.held("compile") as is_ours:
        # Another run may have finished it meanwhile.
        if not is_ours or not is_missing(missing, watch, settings):
            return "left to another run"
        # The run that the event starts finds the compile held or finished, and ends as Skipped.
        if shared.announcement() is None:
            announce_created(missing, watch)
        outcome = run_one(missing.request, deployment)
        if not isinstance(outcome, CompileflowError):
            shared.record_compiled()
            return "compiled"
        shared.record_failure(outcome)
        get_run_logger().error("%s for %s: %s", missing.source.uri, missing.request.target, outcome)
        return "failed"
