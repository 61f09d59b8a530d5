"""The command `compileflow`, assembled from one file per command."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version as installed_version
from typing import Annotated, Any

import typer

from compileflow.cli.autocompile import autocompile
from compileflow.cli.command import Command
from compileflow.cli.compile import compile_command, run_here
from compileflow.cli.demo import demo_command
from compileflow.cli.diff import diff
from compileflow.cli.gc import gc
from compileflow.cli.import_older import import_older
from compileflow.cli.inspect import inspect
from compileflow.cli.lineage import lineage
from compileflow.cli.mirror import mirror
from compileflow.cli.output import say
from compileflow.cli.promote import promote
from compileflow.cli.pull import pull
from compileflow.cli.settle import settle
from compileflow.cli.targets import targets
from compileflow.cli.verify import verify
from compileflow.cli.versions import versions

# Panels of `compileflow --help`, with their commands in order. A new command goes here.
_COMMANDS: Mapping[str, Mapping[str, Callable[..., Any]]] = {
    "Compile": {
        # Only Prefect has credentials blocks.
        "compile": compile_command(run_here, without=("aws_credentials_block",)),
        "autocompile": autocompile,
        "demo": demo_command(run_here),
        "targets": targets,
    },
    "Artifacts and versions": {
        "inspect": inspect,
        "diff": diff,
        "verify": verify,
        "versions": versions,
        "lineage": lineage,
        "settle": settle,
        "promote": promote,
        "pull": pull,
        "import-older": import_older,
    },
    "Artifact stores": {"gc": gc, "mirror": mirror},
}

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


def _print_version(requested: bool) -> None:
    if requested:
        say(f"compileflow {installed_version('compileflow')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compile Hugging Face models, validate the result, and manage the compiled versions."""


for panel, commands in _COMMANDS.items():
    for name, command in commands.items():
        app.command(name, cls=Command, rich_help_panel=panel)(command)
