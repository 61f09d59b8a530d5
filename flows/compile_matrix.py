"""compile_matrix: compile models x targets x precisions, and compare all cells on one page."""

from __future__ import annotations

from typing import Annotated, Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.states import Completed, Failed
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner
from pydantic import Field

from compileflow.errors import CompileError, CompileflowError, RunLostError, SpecError
from compileflow.selection.matrix import MatrixRequest, impossible_cell
from compileflow.steps.request import CompileRequest
from compileflow.steps.run import CompileResult
from flows.deployed_flow import deployed_flow
from flows.lateness import MaxLateness, skipped_if_late
from flows.one_run import run_one
from flows.registration import as_error
from tasks.matrix import compare_cells


@task(name="cell", description="Compile one model for one target at one precision.", cache_policy=NO_CACHE)
def run_cell(request: CompileRequest, deployment: str | None) -> CompileResult | CompileflowError:
    """Return the result of the cell's run, or its error. A run that was lost with its worker runs once more."""
    outcome = run_one(request, deployment)
    if isinstance(outcome, RunLostError):
        get_run_logger().warning("the cell runs once more: %s", outcome)
        outcome = run_one(request, deployment)
    return outcome


@deployed_flow(
    name="compile-matrix",
    description="Compile models for targets at precisions. A cell that fails does not affect the others.",
)
def compile_matrix(
    matrix: MatrixRequest,
    deployment: str | None = None,
    at_once: Annotated[int, Field(ge=1)] = 1,
    max_lateness_s: MaxLateness = None,
    dask: str | None = None,
) -> State[Any]:
    """Run all cells, compare them on one page, and say how many failed.

    Args:
        matrix: Models, targets, precisions, and the fields that all requests share.
        deployment: Deployment of compile_model whose workers run the cells, as FLOW/DEPLOYMENT. Empty: the cells
            run in this process.
        at_once: Number of cells that run at the same time.
        max_lateness_s: For schedules: a run that starts more seconds than this after its time ends as Skipped.
        dask: Address of a Dask scheduler whose workers run the cells, such as tcp://host:8786. Each worker thread
            runs one cell at a time, whatever at_once says. Empty: the cells do not use Dask.
    """
    skipped = skipped_if_late(max_lateness_s)
    if skipped is not None:
        return skipped
    requests = matrix.requests()
    possible = [request for request in requests if impossible_cell(request) is None]
    try:
        pool = task_runner(at_once, dask)
    except SpecError as refusal:
        # Raised, it would be logged with a traceback.
        return Failed(message=str(refusal), data=refusal)
    outcomes = run_cells(possible, deployment, pool)
    compared, headline, failures = compare_cells(requests, outcomes)
    if failures:
        error = CompileError(f"{headline}.", hint=f"Page: {compared}", report_uri=compared)
        return Failed(message=error.message, data=error)
    return Completed(message=headline, data=compared)


def task_runner(at_once: int, dask: str | None) -> TaskRunner[Any]:
    """Return what runs the cells: threads of this process, or the workers of a Dask cluster.

    Raises:
        SpecError: A Dask cluster is named, but prefect-dask is not installed.
    """
    if dask is None:
        return ThreadPoolTaskRunner(max_workers=at_once)
    try:
        from prefect_dask import DaskTaskRunner
    except ImportError as error:
        raise SpecError(
            f"The cells have to run on the Dask cluster {dask}, but prefect-dask is not installed.",
            hint="Run: pip install 'compileflow[dask]'",
        ) from error
    return DaskTaskRunner(address=dask)


def run_cells(
    requests: list[CompileRequest], deployment: str | None, pool: TaskRunner[Any]
) -> list[CompileResult | CompileflowError]:
    """Run the cells in a pool, and return their outcomes in order."""
    with pool as runner:
        futures: list[PrefectFuture[Any]] = [
            runner.submit(
                run_cell.with_options(task_run_name=f"{request.model} {request.target} {request.precision.value}"),
                {"request": request, "deployment": deployment},
            )
            for request in requests
        ]
        outcomes = [future.result(raise_on_failure=False) for future in futures]
    return [
        outcome if isinstance(outcome, CompileResult | CompileflowError) else as_error(outcome)
        for outcome in outcomes
    ]
