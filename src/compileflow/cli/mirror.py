"""mirror: copy an artifact store into another."""

from __future__ import annotations

from typing import Annotated

import typer

from compileflow.cli.common import one_line_errors
from compileflow.cli.output import say


@one_line_errors
def mirror(
    from_store: Annotated[
        str, typer.Argument(metavar="FROM_STORE", help="URI of the artifact store to copy from.")
    ],
    to_store: Annotated[str, typer.Argument(metavar="TO_STORE", help="URI of the artifact store to copy to.")],
    digest: Annotated[
        list[str] | None, typer.Option(help="Digest of a folder to copy. Repeatable. Default: all folders.")
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Also compare the folders that TO_STORE has, and replace altered files."),
    ] = False,
) -> None:
    """Copy every folder that TO_STORE does not have, and check every byte."""
    from compileflow.admin.mirror import mirror_store
    from compileflow.settings import get_settings

    count = mirror_store(
        from_store,
        to_store,
        settings=get_settings(),
        digests=digest or None,
        check=check,
        on_progress=lambda line: say(line, err=True),
    )
    say(f"{to_store} has {count} folders of {from_store}")
