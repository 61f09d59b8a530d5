"""find missing: list the source versions that have no compiled version for a target."""

from __future__ import annotations

from prefect import get_run_logger, task
from prefect.events import emit_event

from compileflow.admin.watch import MissingCompile, WatchRequest, is_new, missing_compiles, record_announcement
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


def announce_created(missing: MissingCompile) -> None:
    """Send an event about a source version that needs a compile, once for all watchers."""
    settings = settings_for(missing.request)
    if not is_new(missing, settings):
        return
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
        },
    )
    record_announcement(missing, settings)
