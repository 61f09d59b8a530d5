"""revalidate: validate the promoted versions again, and flag those that no longer pass."""

from __future__ import annotations

from typing import Any

from prefect.artifacts import create_table_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from compileflow.admin.revalidate import Revalidation, versions_in_stages
from compileflow.contracts import Stage
from compileflow.errors import CompileflowError, VerdictError
from compileflow.settings import get_settings
from compileflow.validation.settings import ValidationSettings
from flows.deployed_flow import deployed_flow
from flows.lateness import MaxLateness, skipped_if_late
from flows.registration import as_error
from tasks.revalidate import revalidate_one
from tasks.server import patiently


@deployed_flow(
    name="revalidate",
    description="Validate promoted versions again with the worker's runtimes, from the stored artifact and model.",
)
def revalidate(
    stages: tuple[Stage, ...] = ("staging", "production"),
    names: tuple[str, ...] = (),
    registry_uri: str | None = None,
    validation: ValidationSettings = ValidationSettings(),  # noqa: B008 - it is frozen
    timeout_s: int = 3600,
    trust_remote_code: bool = False,
    max_lateness_s: MaxLateness = None,
) -> State[Any]:
    """Validate each version without the cache. The run fails if one regressed; the registry then says which.

    Args:
        stages: Stages whose versions are validated.
        names: Names of the models. Empty: all.
        registry_uri: URI of the registry. Empty: the configured one.
        validation: How the versions are validated. Give the settings that they were compiled with.
        timeout_s: Limit of one validation, in seconds.
        trust_remote_code: Run Python files that come with the models.
        max_lateness_s: For schedules: a run that starts more seconds than this after its time ends as Skipped.
    """
    skipped = skipped_if_late(max_lateness_s)
    if skipped is not None:
        return skipped
    uri = get_settings().resolved_registry_uri(registry_uri)
    try:
        versions = versions_in_stages(uri, get_settings(), stages=stages, names=names)
    except CompileflowError as refusal:
        return Failed(message=str(refusal), data=refusal)
    rows = []
    for version in versions:
        state = revalidate_one.with_options(task_run_name=f"{version.name} version {version.version}")(
            version, uri, validation, timeout_s=timeout_s, trust_remote_code=trust_remote_code, return_state=True
        )
        outcome = state.result(raise_on_failure=False)
        if not isinstance(outcome, Revalidation):
            outcome = Revalidation(version, "not checked", str(as_error(outcome)))
        rows.append(outcome)
    return conclude(rows)


def conclude(rows: list[Revalidation]) -> State[Any]:
    """Show all outcomes, and return the final state of the run."""
    outcomes = [row.outcome for row in rows]
    headline = ", ".join(f"{outcomes.count(kind)} {kind}" for kind in dict.fromkeys(outcomes)) or "none promoted"
    table = [
        {
            "model": row.version.name,
            "version": str(row.version.version),
            "stage": row.version.stage,
            "outcome": row.outcome,
            "reason": row.reason,
        }
        for row in rows
    ]
    patiently(create_table_artifact, table, key="revalidation", description=headline)
    if "regressed" in outcomes:
        error = VerdictError(f"{headline}.", hint="The notes in the registry say why.")
        return Failed(message=headline, data=error)
    return Completed(message=headline, data=headline)
