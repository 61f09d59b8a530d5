"""keep outcome: keep the outcome of a run for the flow that started it on another machine."""

from __future__ import annotations

from prefect import task

from compileflow.errors import CompileflowError
from compileflow.steps.outcomes import put_outcome
from compileflow.steps.request import CompileRequest
from compileflow.steps.run import CompileResult
from tasks.policies import RETRIES
from tasks.settings import settings_for


@task(name="keep outcome", description="Keep the outcome for the flow that started this run.", **RETRIES)
def keep_outcome(request: CompileRequest, outcome: CompileResult | CompileflowError, run_id: str) -> None:
    """Write the outcome to the artifact store."""
    put_outcome(request, outcome, run_id, settings_for(request))
