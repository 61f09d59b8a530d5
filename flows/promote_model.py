"""promote_model: ask a person whether a version may enter a stage, and record the answer in the registry."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal
from uuid import UUID

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.deployments import run_deployment
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from prefect.runtime import deployment, flow_run
from prefect.states import Cancelled, Completed, Failed
from pydantic import Field, ValidationError

from compileflow.admin.approval import approval_markdown
from compileflow.admin.promote import check_promotable, same_versions
from compileflow.errors import CompileflowError, SpecError
from compileflow.settings import get_settings
from flows.deployed_flow import deployed_flow
from tasks.promote import note, promote

WHO = "promote-model"
# A character that is to be seen: neither space nor one without a width.
_NOT_BLANK = r"[^\s\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]"
# Prefect itself fails a run that waits longer, without a trace in the registry.
_GRACE = timedelta(days=1)
ServingStage = Literal["staging", "production"]


class Approval(RunInput):
    """The form that a waiting run shows. It asks for a name, because Prefect does not check who answers."""

    decision: Literal["approve", "reject"] = Field(title="Decision", json_schema_extra={"position": 0})
    who: str = Field(
        pattern=_NOT_BLANK,
        title="Your name",
        description="The registry keeps it with the version.",
        json_schema_extra={"position": 1},
    )
    reason: str = Field(
        pattern=_NOT_BLANK,
        title="Reason",
        description="The registry keeps it with the version.",
        json_schema_extra={"position": 2},
    )


@deployed_flow(
    name="promote-model",
    description="Ask a person whether a version may enter a stage. The run waits without a worker.",
    flow_run_name="{name} version {version} to {stage}",
    persist_result=True,
)
def promote_model(
    name: str,
    version: int,
    stage: ServingStage = "production",
    registry_uris: tuple[str, ...] = (),
    wait_hours: Annotated[float, Field(gt=0)] = 72,
    expires: UUID | None = None,
) -> State[Any]:
    """Show the version, wait for an answer, and promote it or record why not.

    Args:
        name: Name of the model.
        version: Number of the version in the first registry.
        stage: Stage that the version may enter.
        registry_uris: Registries to promote in. Empty: the configured ones.
        wait_hours: Hours until the question expires.
        expires: Leave empty. The flow schedules a run with this parameter, which ends the waiting run.
    """
    uris = get_settings().resolved_registry_uris(registry_uris)
    try:
        if expires is not None:
            return expire(expires, name, version, stage, uris)
        return ask(name, version, stage, uris, timedelta(hours=wait_hours))
    except CompileflowError as error:
        return Failed(message=str(error), data=error)


def ask(name: str, version: int, stage: ServingStage, uris: Sequence[str], wait: timedelta) -> State[Any]:
    """Suspend the run until it is answered. Prefect then runs the flow from its start, and this returns.

    Raises:
        VerdictError: The version did not pass.
        SpecError: The run does not belong to a deployment, without which no worker would resume it.
    """
    settings = get_settings()
    versions = same_versions(name, version, registry_uris=uris, settings=settings)
    check_promotable(versions.values(), stage, settings)
    deadline, expiry_id = schedule_expiry(name, version, stage, uris, wait)
    digest = versions[uris[0]].artifact_digest
    text = approval_markdown(versions[uris[0]], stage, settings)
    timeout = deadline + _GRACE - datetime.now(UTC)
    form = Approval.with_initial_data(description=text)
    get_run_logger().info("The run waits for an answer. Choose Resume to read about the version and to decide.")
    try:
        # An answer is about the artifact that the form showed: if the version has another one by now, ask again.
        answer = suspend_flow_run(
            wait_for_input=form, timeout=max(1, int(timeout.total_seconds())), key=f"approval-{digest}"
        )
    except ValidationError as error:
        # Prefect reads an answer whenever a run that was suspended starts again.
        raise SpecError(
            "The run was started again without an answer.", hint="Start a new run of promote-model."
        ) from error
    if datetime.now(UTC) > deadline:
        # The run that ends this one comes late, or is at it now.
        note(name, version, uris, who=WHO, reason=f"approval for {stage} expired before {answer.who} answered")
        return Cancelled(name="Expired", message=f"{answer.who} answered after the deadline.")
    with get_client(sync_client=True) as client:
        client.delete_flow_run(expiry_id)
    if answer.decision == "reject":
        note(name, version, uris, who=answer.who, reason=f"rejected for {stage}: {answer.reason}")
        return Completed(name="Rejected", message=f"{answer.who}: {answer.reason}")
    lines = promote(name, version, stage, uris, who=answer.who, reason=answer.reason, artifact_digest=digest)
    return Completed(message="; ".join(lines))


def schedule_expiry(
    name: str, version: int, stage: ServingStage, uris: Sequence[str], wait: timedelta
) -> tuple[datetime, UUID]:
    """Schedule the run that ends this one without an answer; a second call returns the same run.

    Returns:
        The deadline, and the id of the scheduled run.
    """
    if not deployment.id:
        raise SpecError(
            "Only a run of a deployment can wait for an answer.",
            hint="Start it with: prefect deployment run promote-model/promote-model",
        )
    run: Any = run_deployment(
        UUID(deployment.id),
        parameters={
            "name": name,
            "version": version,
            "stage": stage,
            "registry_uris": uris,
            "expires": flow_run.id,
        },
        scheduled_time=datetime.now(UTC) + wait,
        timeout=0,
        idempotency_key=f"expire-{flow_run.id}",
        as_subflow=False,
    )
    return run.expected_start_time, run.id


def expire(run_id: UUID, name: str, version: int, stage: ServingStage, uris: Sequence[str]) -> State[Any]:
    """End a run that still waits for an answer, and record that in the registries."""
    with get_client(sync_client=True) as client:
        waiting = client.read_flow_run(run_id)
        if waiting.state is None or not waiting.state.is_paused():
            return Completed(message="The question was answered before.")
        client.set_flow_run_state(run_id, Cancelled(name="Expired", message="No answer arrived in time."))
    note(name, version, uris, who=WHO, reason=f"approval for {stage} expired without an answer")
    return Completed(message=f"The question of {waiting.name} expired.")
