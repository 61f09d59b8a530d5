"""compare cells: store the page of a matrix, and show it in the Prefect UI."""

from __future__ import annotations

from collections.abc import Sequence

from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from compileflow.errors import CompileflowError
from compileflow.selection.matrix import (
    impossible_cell,
    matrix_markdown,
    matrix_of,
    measured_cell,
    store_matrix,
)
from compileflow.steps.request import CompileRequest
from compileflow.steps.run import CompileResult
from tasks.server import patiently
from tasks.settings import settings_for


@task(name="compare cells", description="Compare all cells on one page.", cache_policy=NO_CACHE)
def compare_cells(
    requests: Sequence[CompileRequest], outcomes: Sequence[CompileResult | CompileflowError]
) -> tuple[str, str, int]:
    """Return the URI of the stored matrix, its outcome in one line, and the number of failed cells.

    Args:
        requests: Requests of all cells.
        outcomes: Outcomes of the cells that may be compiled, in their order.
    """
    settings = settings_for(requests[0])
    finished = iter(outcomes)
    cells = []
    for request in requests:
        impossible = impossible_cell(request)
        cells.append(
            (impossible, None) if impossible is not None else measured_cell(request, next(finished), settings)
        )
    matrix = matrix_of(cells, settings)
    store_uri = settings.resolved_store_uri(requests[0].store_uri)
    stored = store_matrix(matrix, store_uri=store_uri, settings=settings)
    text = matrix_markdown(matrix, stored.uri)
    patiently(create_markdown_artifact, text, key="matrix", description=matrix.headline)
    get_run_logger().info(matrix.headline)
    return stored.uri, matrix.headline, len(matrix.failed)
