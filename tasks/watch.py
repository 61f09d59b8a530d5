"""find missing: list the source versions that have no compiled version for a target."""

from __future__ import annotations

from prefect import get_run_logger, task
from prefect.events import emit_event

from compileflow.admin.watch import (
    AnnouncementStep,
    MissingCompile,
    WatchRequest,
    missing_compiles,
    next_announcement,
)
from compileflow.errors import ProcessError
from compileflow.settings import get_settings
from tasks.events import PREFIX
from tasks.policies import RETRIES
from tasks.settings import settings_for


@task(name="find missing", description="List source versions without a compiled version.", **RETRIES)
def find_missing(watch: WatchRequest) -> list[MissingCompile]:
    """Return what has to be compiled, the oldest source version first."""
    missing = missing_compiles(watch, get_settings())
    get_run_logger().info("%d compiled versions are missing", len(missing))
    return missing


def announce_created(missing: MissingCompile, watch: WatchRequest) -> AnnouncementStep:
    """Send an event about a source version that needs a compile, once for all watchers.

    Returns:
        What was done: "wait" if the compile was announced before, or another watcher announces it now.
    """
    shared = missing.shared(settings_for(missing.request))
    label = f"{missing.source.uri} for {missing.request.target}"
    with shared.held("announce") as is_ours:
        step, number = next_announcement(shared, watch) if is_ours else ("wait", 0)
        if step == "give up":
            error = ProcessError(
                f"{label} was announced {number} times, and is still not compiled.",
                hint="Look at the runs of compile-model. Then set retry_failed in one run of watch-registry.",
            )
            shared.record_failure(error)
            get_run_logger().error(str(error))
        elif step != "wait":
            _emit_created(missing)
            shared.record_announcement(number)
        if step == "announce again":
            get_run_logger().warning(
                "%s is announced again, for the %d. of at most %d times: no run has compiled it.",
                label,
                number,
                watch.most_announcements,
            )
    return step


def _emit_created(missing: MissingCompile) -> None:
    source = missing.source
    emit_event(
        f"{PREFIX}.created",
        resource={
            "prefect.resource.id": f"{PREFIX}.{source.uri}",
            "prefect.resource.name": source.name,
            "compileflow.model": source.name,
            "compileflow.target": missing.request.target,
        },
        payload={
            "model": source.model,
            "name": source.name,
            "source_uri": source.uri,
            "created_at": source.created_at,
            "target": missing.request.target,
            "precision": missing.request.precision.value,
            "request": missing.request.model_dump(mode="json", exclude_unset=True),
            "announcement": missing.key,
        },
    )
