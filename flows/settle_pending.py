"""settle_pending: validate an artifact whose verdict is pending-device where the device is, and register it."""

from __future__ import annotations

from typing import Any

from prefect.client.schemas.objects import State
from prefect.states import Failed

from compileflow.errors import CompileflowError, VerdictError
from compileflow.settings import get_settings
from compileflow.steps.run import CompileResult
from compileflow.steps.settle import end_waiting
from flows.compile_model import announce_validated, finish
from flows.deployed_flow import deployed_flow
from tasks.settle import settle


@deployed_flow(
    name="settle-pending",
    description="Validate an artifact that was compiled without its device, and register it.",
)
def settle_pending(
    artifact_uri: str, timeout_s: int = 3600, trust_remote_code: bool = False
) -> CompileResult | State[Any]:
    """Compare the artifact with the recorded answers of its source model. Latency is not compared.

    Args:
        artifact_uri: URI of an artifact with the verdict pending-device.
        timeout_s: Limit of the validation, in seconds.
        trust_remote_code: Run Python files that come with the model.
    """
    try:
        settled = settle(artifact_uri, timeout_s=timeout_s, trust_remote_code=trust_remote_code)
        pending = settled.pending
        result = finish(pending.source, pending.artifact, settled.validated, settled.request)
        end_waiting(settled, get_settings())
    except CompileflowError as error:
        return Failed(message=error.message if isinstance(error, VerdictError) else str(error), data=error)
    announce_validated(result)
    return result
