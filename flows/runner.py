"""Run compile_model for several requests, one after the other, and collect results and errors."""

from __future__ import annotations

from collections.abc import Sequence

from prefect.exceptions import TerminationSignal
from prefect.settings import PREFECT_API_URL

from compileflow._process.interrupts import Stopped
from compileflow.errors import CompileflowError, ProcessError, first_line
from compileflow.steps.request import CompileRequest
from compileflow.steps.run import CompileResult
from flows.compile_model import compile_model


def run_requests(requests: Sequence[CompileRequest]) -> list[CompileResult | CompileflowError]:
    """Run each request as its own flow run; a run that fails does not stop the others.

    Raises:
        Stopped: SIGTERM arrived; Prefect handles that signal within a flow.
    """
    if not PREFECT_API_URL.value():
        from flows.embedded_server import EmbeddedServer

        EmbeddedServer()
    try:
        return [_run(request) for request in requests]
    except TerminationSignal as error:
        raise Stopped(error.signal) from error


def _run(request: CompileRequest) -> CompileResult | CompileflowError:
    try:
        state = compile_model(request, return_state=True)
    except CompileflowError as error:
        return error
    except Exception as error:  # noqa: BLE001 - Prefect raises what its client and its database raise
        return ProcessError(
            f"Prefect cannot run the flow: {type(error).__name__}: {first_line(error)}.",
            hint="Check the Prefect server of PREFECT_API_URL; without one, unset the variable.",
        )
    outcome = state.result(raise_on_failure=False)
    if isinstance(outcome, CompileResult | CompileflowError):
        return outcome
    return ProcessError(f"The run ended as {state.name}: {state.message}")
