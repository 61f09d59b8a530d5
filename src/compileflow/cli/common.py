"""Parts that the commands share: signals, errors in one line, common options, and stored folders as local ones."""

from __future__ import annotations

import errno
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, ParamSpec

import typer
from typer.models import ArgumentInfo, ParameterInfo

from compileflow._process.interrupts import signal_of, stopped_by_signals, swallowed, word_for
from compileflow.cli.output import escape_log_lines, say, say_json
from compileflow.errors import CompileflowError, MissingPackageError, SourceError, SpecError

if TYPE_CHECKING:
    from compileflow.contracts import ModelVersion

FAILED, WRONG_REQUEST = 1, 2
# What the extra compile brings, by the names of the modules.
_COMPILE_PACKAGES = ("onnx", "onnxscript", "safetensors", "torch", "transformers")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ModelName = Annotated[str, typer.Argument(help="Name of a registered model.")]
VersionRef = Annotated[str, typer.Argument(help="Version number, or the stage that the version is in.")]
RegistryUri = Annotated[
    str | None, typer.Option("--registry", help="URI of the registry. Default: the configured one.")
]
Parameters = ParamSpec("Parameters")
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]


def one_line_errors(command: Callable[Parameters, None]) -> Callable[Parameters, None]:
    """End with one line and an exit code instead of a traceback; with --json, also print the error as JSON."""

    @wraps(command)
    def wrapped(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
        with stopped_by_signals():
            try:
                _refuse_empty_values(command, kwargs)
                command(*args, **kwargs)
            except CompileflowError as error:
                fail(error, as_json=bool(kwargs.get("as_json")))
            except ModuleNotFoundError as error:
                fail(_missing_package(error), as_json=bool(kwargs.get("as_json")))
            except KeyboardInterrupt as error:
                stop(error, "No partial result was kept.")
            except Exception as error:
                interrupt = swallowed()
                if interrupt is None or isinstance(error, typer.Exit):
                    raise
                stop(interrupt, "No partial result was kept.")

    return wrapped


def _missing_package(error: ModuleNotFoundError) -> MissingPackageError:
    """Return the error for a package that compiling needs; raise the error of any other module."""
    package = (error.name or "").partition(".")[0]
    if package not in _COMPILE_PACKAGES:
        raise error
    return MissingPackageError(
        f"This command needs {package}, which is not installed.", hint="Run: pip install 'compileflow[compile]'."
    )


def exit_code(error: CompileflowError) -> int:
    """Return the exit code for an error: a wrong request or an unusable model differs from a failure."""
    return WRONG_REQUEST if isinstance(error, SpecError | SourceError) and not error.retryable else FAILED


def fail(error: CompileflowError, code: int | None = None, *, as_json: bool = False) -> NoReturn:
    """Print an error in one line and end the command; code None is the exit code of the error."""
    if as_json:
        say_json({"error": error_values(error)})
    say(f"error: {error}", err=True)
    print_report(error)
    raise typer.Exit(exit_code(error) if code is None else code) from error


def print_report(error: CompileflowError) -> None:
    """Print where the report of an error is, its Data Docs, and the bundle that shows the failure again."""
    for name, path in _report_paths(error).items():
        say(f"{name.replace('_', ' ')}: {path}", err=True)


def error_values(error: CompileflowError) -> dict[str, str]:
    """Return an error for JSON, with the paths of its report's page, Data Docs and bundle, if it has them."""
    return error.to_dict() | {name: str(path) for name, path in _report_paths(error).items()}


def _report_paths(error: CompileflowError) -> dict[str, Path]:
    """Copy what the report of an error consists of out of the store, and return the paths by name."""
    from compileflow.steps.report_file import data_docs_beside

    page = report_page(error)
    paths = {
        "report": page,
        "data_docs": data_docs_beside(page) if page else None,
        "bundle": failure_bundle(error),
    }
    return {name: path for name, path in paths.items() if path is not None}


def report_page(error: CompileflowError) -> Path | None:
    """Copy the HTML page of an error's report or comparison out of the store; None without a readable one."""
    if not error.report_uri:
        return None
    from compileflow.selection.comparison_file import export_comparison
    from compileflow.settings import get_settings
    from compileflow.steps.report_file import export_report

    for export in (export_report, export_comparison):
        with suppress(CompileflowError):
            return export(error.report_uri, get_settings())
    return None


def failure_bundle(error: CompileflowError) -> Path | None:
    """Copy the bundle of an error's report out of the store; None without a readable one."""
    if not error.report_uri:
        return None
    from compileflow.settings import get_settings
    from compileflow.steps.report_file import export_bundle

    with suppress(CompileflowError):
        return export_bundle(error.report_uri, get_settings())
    return None


def stop(error: KeyboardInterrupt, outcome: str) -> NoReturn:
    """End the command after Ctrl-C or SIGTERM, with one line about the outcome."""
    number = signal_of(error)
    say(f"{word_for(number)} {outcome}", err=True)
    raise typer.Exit(128 + number) from error


def run_app(app: typer.Typer, prog_name: str) -> NoReturn:
    """Run a command line. It ends with one line if its output cannot be written; --json covers wrong options."""
    escape_log_lines()
    try:
        if "--json" in sys.argv:
            _run_with_json(app, prog_name)
        app(prog_name=prog_name)
    except OSError as error:
        if error.filename is not None:
            raise
        # Python writes the rest of its buffer when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if error.errno != errno.EPIPE:
            with suppress(OSError):
                say(f"error: The output cannot be written: {error.strerror}.", err=True)
        sys.exit(FAILED)
    raise AssertionError("unreachable")


def _run_with_json(app: typer.Typer, prog_name: str) -> NoReturn:
    try:
        sys.exit(app(prog_name=prog_name, standalone_mode=False))
    except _UsageError as error:
        from typer.rich_utils import rich_format_error

        message = error.format_message()  # type: ignore[attr-defined]
        say_json({"error": {"type": "UsageError", "message": message}})
        rich_format_error(error)  # type: ignore[arg-type]
        sys.exit(WRONG_REQUEST)


def _refuse_empty_values(command: Callable[..., None], values: Mapping[str, Any]) -> None:
    """Refuse an empty text, for example from a variable of a script: it would count as if it were absent."""
    for name, value in values.items():
        if "" not in (value if isinstance(value, list) else [value]):
            continue
        parameter = inspect.signature(command, eval_str=True).parameters[name]
        if parameter.default != "":
            (info,) = (part for part in parameter.annotation.__metadata__ if isinstance(part, ParameterInfo))
            spelling = name.upper() if isinstance(info, ArgumentInfo) else f"--{name.replace('_', '-')}"
            spelling = next(iter(info.param_decls or ()), spelling)
            raise SpecError(
                f"{spelling} was given an empty value.", hint=f"Give a value, or leave {spelling} out."
            )


def artifact_location(text: str) -> str:
    """Return the URI of a registered version's artifact, or of a digest in the configured store.

    Any other location, and an existing path, is returned unchanged.

    Raises:
        IntegrityError: The URI in the registry belongs to another artifact than the one that was registered.
    """
    from compileflow.catalog import open_store
    from compileflow.settings import get_settings
    from compileflow.stores.layout import is_digest

    if is_digest(text) and not Path(text).exists():
        return open_store(get_settings().resolved_store_uri()).folder_uri(text)
    version = registered_version(text)
    return text if version is None else version.artifact_uri


def registered_version(text: str) -> ModelVersion | None:
    """Return the version that a reference means; None if the text is another location.

    Raises:
        IntegrityError: The URI in the registry belongs to another artifact than the one that was registered.
    """
    from compileflow.artifact.integrity import check_registered_uri
    from compileflow.catalog import parse_reference, resolve_reference
    from compileflow.settings import get_settings

    if parse_reference(text) is None:
        return None
    version = resolve_reference(text, get_settings())
    check_registered_uri(version)
    return version


def store_of(location: str) -> str:
    """Return the URI of the store that a location is in; of a local path, that of the configured store."""
    from compileflow.settings import get_settings
    from compileflow.stores.layout import split_uri

    return split_uri(location)[0] if "://" in location else get_settings().resolved_store_uri()


@contextmanager
def stored_folder(location: str) -> Iterator[Path]:
    """Yield a local folder unchanged, or a verified copy of a stored or registered folder."""
    from compileflow.artifact.open import path_of
    from compileflow.catalog import open_store
    from compileflow.stores.layout import split_uri

    location = artifact_location(location)
    if "://" not in location:
        yield path_of(location).absolute()
        return
    store_uri, digest = split_uri(location)
    with open_store(store_uri).open_folder(digest) as folder:
        yield folder
