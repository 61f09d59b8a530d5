"""What the commands share: errors in one line, the --json switch, stored folders as local ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated, ParamSpec

import typer

from compileflow.errors import CompileflowError

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RegistryUri = Annotated[str | None, typer.Option("--registry", help="Registry's URI. Default: as configured.")]
Parameters = ParamSpec("Parameters")


def one_line_errors(command: Callable[Parameters, None]) -> Callable[Parameters, None]:
    """End with one line and exit code 1 instead of a traceback."""

    @wraps(command)
    def wrapped(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except CompileflowError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            typer.echo("Interrupted; nothing half-made was kept.", err=True)
            raise typer.Exit(130) from error

    return wrapped


def artifact_location(text: str) -> str:
    """Return the URI of a registered version's artifact, and any other location as it is.

    Raises:
        IntegrityError: the version's URI names another artifact than was registered.
    """
    from compileflow.artifact.integrity import check_same
    from compileflow.catalog import parse_reference, resolve_reference
    from compileflow.settings import get_settings
    from compileflow.stores.layout import split_uri

    if parse_reference(text) is None:
        return text
    version = resolve_reference(text, get_settings())
    where = f"{version.name} version {version.version} has a URI that"
    hint = "Do not use this version; somebody changed it in the registry."
    check_same(where, split_uri(version.artifact_uri)[1], version.artifact_digest, hint=hint)
    return version.artifact_uri


@contextmanager
def stored_folder(location: str) -> Iterator[Path]:
    """Give a local folder as it is, and a stored or registered one as a verified copy."""
    from compileflow.catalog import open_store
    from compileflow.stores.layout import split_uri

    location = artifact_location(location)
    if "://" not in location:
        yield Path(location).expanduser().absolute()
        return
    store_uri, digest = split_uri(location)
    with open_store(store_uri).open_folder(digest) as folder:
        yield folder
