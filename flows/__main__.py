"""The commands of `compileflow` that run requests, here as Prefect flows: python -m flows compile MODEL."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from compileflow.cli.compile import compile_command
from compileflow.cli.demo import demo_command
from compileflow.settings import get_settings
from flows.environment import set_embedded_defaults

if TYPE_CHECKING:
    from compileflow.errors import CompileflowError
    from compileflow.steps.request import CompileRequest
    from compileflow.steps.run import CompileResult

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Run compileflow's Prefect flows."""


def run_as_flows(
    requests: Sequence[CompileRequest], *, progress: bool | None
) -> tuple[list[CompileResult], list[CompileflowError]]:
    """Run requests as flows. The default shows progress only on a terminal."""
    set_embedded_defaults(get_settings(), progress=sys.stderr.isatty() if progress is None else progress)
    # Prefect reads its settings when it is imported.
    from flows.runner import run_requests

    return run_requests(requests)


app.command("compile")(compile_command(run_as_flows))
app.command("demo")(demo_command(run_as_flows))

if __name__ == "__main__":
    app(prog_name="python -m flows")
