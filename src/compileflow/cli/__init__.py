"""The command `compileflow`: look at targets, artifacts and versions, promote and pull them, tidy stores."""

from __future__ import annotations

import typer

from compileflow.cli import artifacts, storage, versions

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Compiled transformers models: what there is, what it is, whether it is proven, where it serves."""


for command in (
    artifacts.targets,
    artifacts.inspect,
    artifacts.verify,
    versions.versions,
    versions.promote,
    versions.lineage,
    versions.pull,
    storage.gc,
    storage.mirror,
):
    app.command()(command)
