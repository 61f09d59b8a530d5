"""The commands of `compileflow` that run requests, here as Prefect flows: python -m flows compile MODEL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from compileflow.cli.command import Command
from compileflow.cli.compile import compile_command
from compileflow.cli.demo import demo_command
from compileflow.settings import get_settings
from flows.environment import set_embedded_defaults
from flows.matrix_command import matrix
from flows.run_project import run

if TYPE_CHECKING:
    from compileflow.errors import CompileflowError
    from compileflow.steps.request import CompileRequest
    from compileflow.steps.run import CompileResult

_EXTRAS = ("prefect",)

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Run compileflow's Prefect flows."""


def run_as_flows(requests: Sequence[CompileRequest], *, progress: bool) -> list[CompileResult | CompileflowError]:
    """Run requests as flows."""
    server = set_embedded_defaults(get_settings(), progress=progress)
    # Prefect reads its settings when it is imported.
    from flows.runner import run_requests

    return run_requests(requests, server)


app.command("compile", cls=Command)(compile_command(run_as_flows, extras=_EXTRAS))
app.command("run", cls=Command)(run)
app.command("demo", cls=Command)(demo_command(run_as_flows, extras=_EXTRAS))
app.command("matrix", cls=Command)(matrix)
