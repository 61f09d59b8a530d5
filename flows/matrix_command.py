"""matrix: the command that compiles models x targets x precisions as one flow run."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compileflow.catalog import get_target
from compileflow.cli.common import one_line_errors
from compileflow.cli.output import say, say_json
from compileflow.errors import CompileflowError, SpecError, first_problem
from compileflow.settings import Settings, get_settings
from flows.environment import set_embedded_defaults

if TYPE_CHECKING:
    from compileflow.selection.matrix import MatrixRequest

_COLUMNS = ("model", "target", "precision", "verdict", "latency / eager", "size", "compile", "registered as")


@one_line_errors
def matrix(
    model: Annotated[
        list[str], typer.Option(help="Model folder, GGUF file, Hub id or registered version. Repeatable.")
    ],
    target: Annotated[list[str], typer.Option(help="Target to compile for; not auto. Repeatable.")],
    precision: Annotated[
        list[str] | None, typer.Option(help="Precision to compile at. Repeatable. Default: fp32.")
    ] = None,
    field: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Field of every compile request, for example allow_warn=true. VALUE is read as JSON; anything "
            "else is taken as text. Repeatable.",
        ),
    ] = None,
    deployment: Annotated[
        str | None,
        typer.Option(help="Deployment whose workers compile, as FLOW/DEPLOYMENT. Default: this process compiles."),
    ] = None,
    at_once: Annotated[int, typer.Option(min=1, help="Cells that run at the same time.")] = 1,
    dask: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Dask scheduler whose workers run the cells, for example tcp://host:8786. Default: without Dask.",
        ),
    ] = None,
    progress: Annotated[bool, typer.Option(help="Show the progress of each cell.", show_default=False)] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the matrix as JSON.")] = False,
) -> None:
    """Compile each model for each target at each precision, and compare all cells on one page.

    A cell that fails does not affect the others; the exit code is then 1. Unchanged cells come from the cache.
    """
    from pydantic import ValidationError

    from compileflow.cli.tables import output_console, print_lines, print_table
    from compileflow.selection.matrix import MatrixRequest, export_matrix, matrix_table, read_matrix
    from compileflow.steps.request import AUTO

    for name in target:
        if name != AUTO:
            # Its error lists the targets.
            get_target(name)
    fields = {"models": model, "targets": target, "shared": _shared(field or ())}
    try:
        request = MatrixRequest.model_validate(fields | ({"precisions": precision} if precision else {}))
    except ValidationError as error:
        raise SpecError(f"{_in_options(first_problem(error, show_input=True))}.") from error
    settings = get_settings()
    _refuse_hopeless(request, settings, on_workers=deployment is not None or dask is not None)
    server = set_embedded_defaults(settings, progress=progress)
    # Prefect reads its settings when it is imported.
    from flows.runner import run_matrix

    outcome = run_matrix(request, server, deployment=deployment, at_once=at_once, dask=dask)
    compared = read_matrix(outcome, settings)
    if as_json:
        say_json(compared.model_dump(mode="json"))
    else:
        print_table(_COLUMNS, matrix_table(compared), title="matrix", optional=("compile", "size"))
        page = export_matrix(outcome, settings)
        print_lines(output_console(), compared.headline, f"page: {page}")
    for cell in compared.failed:
        say(f"error: {cell.model}, {cell.candidate.label}: {cell.error}", err=True)
    if compared.failed:
        raise typer.Exit(1)


def _in_options(problem: str) -> str:
    """Return a problem of a matrix request with options in the place of its fields.

    >>> _in_options("shared.foo: this name is not known")
    '--field foo: this name is not known'
    """
    problem = re.sub(r"^(model|target|precision)s\.\d+", r"--\1", problem)
    return re.sub(r"^shared[. ]", "--field ", problem)


def _refuse_hopeless(request: MatrixRequest, settings: Settings, *, on_workers: bool) -> None:
    """Refuse a matrix of which no cell can run, before a server starts. The models of workers may be elsewhere.

    Raises:
        CompileflowError: The reason of the first cell, if every cell is refused.
    """
    from compileflow.selection.matrix import impossible_cell
    from compileflow.steps.preflight import check_request

    refusals = []
    for cell in request.requests():
        if impossible_cell(cell) is None and not on_workers:
            try:
                check_request(cell, settings, extras=("prefect",))
            except CompileflowError as error:
                refusals.append(error)
            else:
                return
    if refusals:
        raise refusals[0]


def _shared(texts: list[str] | tuple[()]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name in fields:
            raise SpecError(
                f"--field {text}: expected NAME=VALUE, each name once.",
                hint="For example: --field allow_warn=true",
            )
        try:
            fields[name] = json.loads(value)
        except ValueError:
            fields[name] = value
    return fields
