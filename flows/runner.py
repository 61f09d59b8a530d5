"""Run compile_model for several requests, one after the other, and collect results and errors."""

from __future__ import annotations

from collections.abc import Sequence

from prefect.settings import PREFECT_API_URL

from compileflow.errors import CompileflowError, ProcessError
from compileflow.steps.request import CompileRequest
from compileflow.steps.run import CompileResult
from flows.compile_model import compile_model


def run_requests(requests: Sequence[CompileRequest]) -> tuple[list[CompileResult], list[CompileflowError]]:
    """Run each request as its own flow run; a run that fails does not stop the others."""
    if not PREFECT_API_URL.value():
        from flows.embedded_server import EmbeddedServer

        EmbeddedServer()
    results: list[CompileResult] = []
    errors: list[CompileflowError] = []
    for request in requests:
        state = compile_model(request, return_state=True)
        outcome = state.result(raise_on_failure=False)
        if isinstance(outcome, CompileResult):
            results.append(outcome)
        elif isinstance(outcome, CompileflowError):
            errors.append(outcome)
        else:
            errors.append(ProcessError(f"The run ended as {state.name}: {state.message}"))
    return results, errors
