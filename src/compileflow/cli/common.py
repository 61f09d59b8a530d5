"""Parts that the commands share: errors in one line, common options, and stored folders as local ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated, NoReturn, ParamSpec

import typer

from compileflow.errors import CompileflowError, SpecError

FAILED, WRONG_REQUEST, INTERRUPTED = 1, 2, 130

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ModelName = Annotated[str, typer.Argument(help="Name of a registered model.")]
RegistryUri = Annotated[
    str | None, typer.Option("--registry", help="URI of the registry. Default: the configured one.")
]
Parameters = ParamSpec("Parameters")


def one_line_errors(command: Callable[Parameters, None]) -> Callable[Parameters, None]:
    """End with one line and an exit code instead of a traceback."""

    @wraps(command)
    def wrapped(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except CompileflowError as error:
            fail(error)
        except KeyboardInterrupt as error:
            typer.echo("Interrupted. No partial result was kept.", err=True)
            raise typer.Exit(INTERRUPTED) from error

    return wrapped


def exit_code(error: CompileflowError) -> int:
    """Return the exit code for an error: a wrong request differs from a failure."""
    return WRONG_REQUEST if isinstance(error, SpecError) else FAILED


def fail(error: CompileflowError, code: int | None = None) -> NoReturn:
    """Print an error in one line and end the command; code None is the exit code of the error."""
    typer.echo(f"error: {error}", err=True)
    raise typer.Exit(exit_code(error) if code is None else code) from error


def artifact_location(text: str) -> str:
    """Return the URI of a registered version's artifact; any other location is returned unchanged.

    Raises:
        IntegrityError: The URI in the registry belongs to another artifact than the one that was registered.
    """
    from compileflow.artifact.integrity import check_digest
    from compileflow.catalog import parse_reference, resolve_reference
    from compileflow.settings import get_settings
    from compileflow.stores.layout import split_uri

    if parse_reference(text) is None:
        return text
    version = resolve_reference(text, get_settings())
    subject = f"the URI of {version.name} version {version.version}"
    hint = "Do not use this version; it was changed in the registry."
    check_digest(subject, split_uri(version.artifact_uri)[1], version.artifact_digest, hint=hint)
    return version.artifact_uri


@contextmanager
def stored_folder(location: str) -> Iterator[Path]:
    """Yield a local folder unchanged, or a verified copy of a stored or registered folder."""
    from compileflow.catalog import open_store
    from compileflow.stores.layout import split_uri

    location = artifact_location(location)
    if "://" not in location:
        yield Path(location).expanduser().absolute()
        return
    store_uri, digest = split_uri(location)
    with open_store(store_uri).open_folder(digest) as folder:
        yield folder
