"""Run one compile request for a flow of several: in this process, or by a worker of a deployment."""

from __future__ import annotations

from typing import Any

from prefect.client.schemas.objects import State
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound

from compileflow.contracts import without_credentials
from compileflow.errors import CompileflowError, ProcessError, RunLostError
from compileflow.steps.outcomes import get_outcome
from compileflow.steps.request import CompileRequest
from compileflow.steps.run import CompileResult
from flows.compile_model import compile_model
from flows.registration import as_error
from tasks.settings import settings_for

_POLL_S = 2.0


def run_one(request: CompileRequest, deployment: str | None) -> CompileResult | CompileflowError:
    """Run compile_model as a subflow and return its result or its error.

    Args:
        request: The request.
        deployment: Deployment of compile_model, as FLOW/DEPLOYMENT; None runs it in this process.
    """
    if deployment is not None:
        return _run_deployed(request, deployment)
    state: State[Any] = compile_model(request, return_state=True)
    outcome = state.result(raise_on_failure=False)
    return outcome if isinstance(outcome, CompileResult) else as_error(outcome)


def _run_deployed(request: CompileRequest, deployment: str) -> CompileResult | CompileflowError:
    parameters = {"request": request.model_dump(mode="json")}
    try:
        run: Any = run_deployment(deployment, parameters=parameters, poll_interval=_POLL_S)
    except ObjectNotFound:
        return ProcessError(
            f"The Prefect server has no deployment {deployment}.", hint="List them with: prefect deployment ls"
        )
    except Exception as error:  # noqa: BLE001 - Prefect raises what its client and its database raise
        return ProcessError(
            f"Prefect cannot run the deployment {deployment}: {error}.",
            hint="Check its name with: prefect deployment ls",
        )
    outcome = get_outcome(request, str(run.id), settings_for(request))
    if outcome is not None:
        return outcome
    state = run.state
    if state is not None and state.is_completed():
        store_uri = without_credentials(settings_for(request).resolved_store_uri(request.store_uri))
        return ProcessError(
            f"The run {run.name} of {deployment} completed, but left no outcome in {store_uri}.",
            hint="Give its workers the same store and the same version of compileflow.",
        )
    return RunLostError(
        f"The run {run.name} of {deployment} ended as {state.name if state else 'unknown'}: "
        f"{(state.message if state else None) or 'without a message'}",
        hint="Open that run in the Prefect UI.",
    )
