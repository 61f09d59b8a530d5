"""compile: the command whose options become a CompileRequest, built around the function that runs requests.

`compileflow compile` runs them in this process; `python -m flows compile` runs the same requests as Prefect flows.
A new option is a parameter of `_compile`, and an entry of its request.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from compileflow.cli.common import FAILED, INTERRUPTED, exit_code, fail
from compileflow.errors import CompileflowError, SpecError
from compileflow.spec import HfTask, Precision

if TYPE_CHECKING:
    from compileflow.steps.request import CompileRequest
    from compileflow.steps.run import CompileResult

_MODEL, _TARGET, _SHAPES = "Model", "Target", "Precision and shapes"
_VALIDATION, _STORES, _RUN = "Validation", "Stores and registries", "Run"
# Options without a panel come first in the help: the five that a newcomer needs.
_TARGET_HELP = "Target to compile for, or auto, which tries all targets. Repeatable. List: compileflow targets."
_MODEL_HELP = "A model folder, a Hub id (owner/name), or a registered version, for example registry:NAME@STAGE."


class Runner(Protocol):
    """A function that runs requests, each one on its own."""

    def __call__(
        self, requests: Sequence[CompileRequest], *, progress: bool | None
    ) -> tuple[list[CompileResult], list[CompileflowError]]:
        """Return the results of the runs that succeeded, and the errors of the others.

        Args:
            requests: The requests, in order.
            progress: Whether to show progress; None is the runner's default.
        """


def compile_command(runner: Runner, *, without: Collection[str] = ()) -> Callable[..., None]:
    """Return the command, for typer to register.

    Args:
        runner: Runs the requests.
        without: Names of parameters that the command does not have.
    """

    def command(**options: Any) -> None:
        _compile(runner, **options)

    signature = inspect.signature(_compile, eval_str=True)
    parameters = [
        parameter for name, parameter in signature.parameters.items() if name not in {"runner", *without}
    ]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__doc__ = _compile.__doc__
    return command


def run_here(
    requests: Sequence[CompileRequest], *, progress: bool | None
) -> tuple[list[CompileResult], list[CompileflowError]]:
    """Run requests in this process, without Prefect. The default shows progress."""
    from compileflow.cli.progress import progress_display
    from compileflow.selection.run import run_any_target
    from compileflow.settings import get_settings

    settings = get_settings()
    results, errors = [], []
    for request in requests:
        prefix = f"{request.target}: " if len(requests) > 1 else ""
        with progress_display(progress is not False, prefix=prefix) as display:
            try:
                results.append(run_any_target(request, settings, progress=display))
            except CompileflowError as error:
                errors.append(error)
    return results, errors


def run_and_print(
    runner: Runner,
    requests: Sequence[CompileRequest],
    *,
    progress: bool | None = None,
    verbose: bool = False,
    as_json: bool = False,
) -> list[CompileResult]:
    """Run requests and print the results and errors; exits if a run failed.

    Args:
        runner: Runs the requests.
        requests: The requests, in order.
        progress: Whether to show progress; None is the runner's default.
        verbose: Print the end of the log that belongs to an error.
        as_json: Print the results as JSON.
    """
    from compileflow.cli.results import log_tail, print_results

    try:
        results, errors = runner(requests, progress=progress)
        if as_json:
            typer.echo(json.dumps([result.model_dump(mode="json") for result in results], indent=1))
        elif results:
            print_results(results)
    except CompileflowError as error:
        # The runner could not start, for example because a setting is wrong.
        fail(error)
    except KeyboardInterrupt as error:
        typer.echo("Interrupted. No partial result was kept; run again to resume.", err=True)
        raise typer.Exit(INTERRUPTED) from error
    for failure in errors:
        if verbose and failure.log_path:
            typer.echo(log_tail(failure.log_path), err=True)
        typer.echo(f"error: {failure}", err=True)
    exit_codes = {exit_code(failure) for failure in errors}
    if exit_codes:
        raise typer.Exit(exit_codes.pop() if len(exit_codes) == 1 else FAILED)
    return results


def checked_request(fields: dict[str, Any]) -> CompileRequest:
    """Return the request with these fields.

    Raises:
        SpecError: The target is unknown, or a field is wrong.
    """
    from pydantic import ValidationError

    from compileflow.catalog import target_names
    from compileflow.errors import first_problem
    from compileflow.spec import TARGET_ALIASES
    from compileflow.steps.request import AUTO, CompileRequest

    choices = (AUTO, *target_names())
    target = fields.get("target")
    if target is not None and target not in (*choices, *TARGET_ALIASES):
        raise SpecError(f"Unknown target {target!r}.", hint=f"Choose one of: {', '.join(choices)}.")
    try:
        return CompileRequest.model_validate(fields)
    except ValidationError as error:
        raise SpecError(f"{first_problem(error, show_input=True)}.") from error


def _complete_target(incomplete: str) -> list[str]:
    from compileflow.catalog import target_names

    return [name for name in ("auto", *target_names()) if name.startswith(incomplete)]


def _complete_task(incomplete: str) -> list[str]:
    return [task.value for task in HfTask if task.startswith(incomplete)]


def _complete_precision(incomplete: str) -> list[str]:
    return [precision.value for precision in Precision if precision.startswith(incomplete)]


def _compile(
    runner: Runner,
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=_MODEL_HELP, show_default=False)] = None,
    target: Annotated[list[str] | None, typer.Option(help=_TARGET_HELP, autocompletion=_complete_target)] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help=f"Hub task: {', '.join(HfTask)}. Default: the task of the registered version, else "
            "detected from the model's architecture.",
            autocompletion=_complete_task,
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(Precision)}. Default: fp32; auto tries all.", autocompletion=_complete_precision
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name in the registry. Default: the model's name.")] = None,
    examples: Annotated[
        str | None,
        typer.Option(help="Your own examples to validate with: a text file, one example per line, or a folder."),
    ] = None,
    model_option: Annotated[
        str | None, typer.Option("--model", help="MODEL as an option.", rich_help_panel=_MODEL)
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a Hub model.", rich_help_panel=_MODEL)
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            help="Run Python files that come with the model, with your rights.",
            rich_help_panel=_MODEL,
            show_default=False,
        ),
    ] = False,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Target option. VALUE is read as JSON; anything else is taken as text. Repeatable.",
            rich_help_panel=_TARGET,
        ),
    ] = None,
    among: Annotated[
        list[str] | None,
        typer.Option(
            help="With auto: target to try. Repeatable. Default: all.",
            rich_help_panel=_TARGET,
            autocompletion=_complete_target,
        ),
    ] = None,
    objective: Annotated[
        str,
        typer.Option(help="With auto: choose by latency, throughput or size.", rich_help_panel=_TARGET),
    ] = "latency",
    max_accuracy_loss: Annotated[
        float | None,
        typer.Option(help="With auto: share of decisions that may change, 0 to 1.", rich_help_panel=_TARGET),
    ] = None,
    max_memory_mb: Annotated[
        float | None,
        typer.Option(help="With auto: serving memory budget in MB (1 MB = 10**6 bytes).", rich_help_panel=_TARGET),
    ] = None,
    max_sequence_length: Annotated[
        int | None,
        typer.Option(
            help="Longest input in tokens (audio: samples). Default: the model's maximum.",
            rich_help_panel=_SHAPES,
        ),
    ] = None,
    bucket: Annotated[
        list[str] | None,
        typer.Option(
            metavar="BATCHxLENGTH",
            help="Shape bucket, for example 1x128. The length is in tokens (audio: samples). Repeatable.",
            rich_help_panel=_SHAPES,
        ),
    ] = None,
    component: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=LENGTH",
            help="Component: one of several maximum lengths in one artifact, which share the weights. The length "
            "is in tokens (audio: samples). Repeatable.",
            rich_help_panel=_SHAPES,
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Text file with examples for static int8; use different ones than for validation.",
            rich_help_panel=_SHAPES,
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="BATCHxLENGTH",
            help="Shape to time, for example 8x128. The length is in tokens (audio: samples). The report quotes "
            "the latency at the first shape. Repeatable.",
            rich_help_panel=_VALIDATION,
        ),
    ] = None,
    max_latency_ratio: Annotated[
        float | None,
        typer.Option(
            help="Gate on the median latency, as a fraction of eager. Default: no gate.",
            rich_help_panel=_VALIDATION,
        ),
    ] = None,
    allow_warn: Annotated[
        bool,
        typer.Option(
            help="Register a version whose verdict is warn.", rich_help_panel=_VALIDATION, show_default=False
        ),
    ] = False,
    store: Annotated[
        str | None,
        typer.Option(help="URI of the artifact store. Default: the configured one.", rich_help_panel=_STORES),
    ] = None,
    registry: Annotated[
        list[str] | None,
        typer.Option(
            help="URI of a registry. Repeatable; the first is read, all are written. Default: as configured.",
            rich_help_panel=_STORES,
        ),
    ] = None,
    aws_credentials_block: Annotated[
        str | None,
        typer.Option(help="Name of a Prefect AwsCredentials block for S3.", rich_help_panel=_STORES),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(help="Step to skip: fetch, compile, validate or register. Repeatable.", rich_help_panel=_RUN),
    ] = None,
    progress: Annotated[
        bool | None, typer.Option(help="Show the progress of each step.", rich_help_panel=_RUN, show_default=False)
    ] = None,
    verbose: Annotated[
        bool,
        typer.Option(
            help="After an error, print the end of the toolchain's log.", rich_help_panel=_RUN, show_default=False
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the results as JSON.", rich_help_panel=_RUN)
    ] = False,
) -> None:
    """Compile a model, validate it, store it and register it. Each target is one run.

    Exit codes: 0 success, 1 a run failed, 2 the request is wrong, 130 interrupted.
    """
    fields: dict[str, Any] = {
        "revision": revision,
        "hf_task": task,
        "precision": precision or Precision.FP32,
        "max_sequence_length": max_sequence_length,
        "trust_remote_code": trust_remote_code,
        "name": name,
        "allow_warn": allow_warn,
        "calibration": {"examples_path": calibration},
        "auto": {
            "objective": {
                "goal": objective,
                "max_accuracy_loss": max_accuracy_loss,
                "max_serving_memory_bytes": None if max_memory_mb is None else int(max_memory_mb * 1e6),
            },
            "targets": among or (),
            "precisions": [precision] if precision else (),
        },
        "store_uri": store,
        "registry_uris": registry or (),
        "aws_credentials_block": aws_credentials_block,
        "steps": dict.fromkeys(skip or (), False),
    }
    try:
        fields["model"] = _model(model, model_option)
        fields["shape_buckets"] = [_bucket(text) for text in bucket or ()]
        fields["components"] = [_component(text) for text in component or ()]
        fields["target_options"] = dict(_target_option(text) for text in option or ())
        fields["validation"] = {
            "examples_path": examples,
            "max_latency_ratio": max_latency_ratio,
            "latency_shapes": [_bucket(text) for text in shape or ()],
        }
        targets = [{"target": name} for name in target] if target else [{}]
        requests = [checked_request(fields | chosen) for chosen in targets]
    except CompileflowError as error:
        fail(error)
    run_and_print(runner, requests, progress=progress, verbose=verbose, as_json=as_json)


def _model(argument: str | None, option: str | None) -> str:
    models = [model for model in (argument, option) if model is not None]
    if not models:
        raise SpecError("No model was given.", hint="Give a model folder, or a Hub id (owner/name).")
    if len(models) > 1:
        raise SpecError(f"Two models were given: {models[0]} and {models[1]}.", hint="Leave --model out.")
    return models[0]


def _bucket(text: str) -> dict[str, int]:
    batch_size, cross, length = text.partition("x")
    if not (cross and batch_size.isdecimal() and length.isdecimal()):
        raise SpecError(f"{text!r} is not a shape bucket.", hint="Write it as BATCHxLENGTH, for example 1x128.")
    return {"batch_size": int(batch_size), "sequence_length": int(length)}


def _component(text: str) -> dict[str, Any]:
    name, equals, length = text.partition("=")
    if not (equals and length.isdecimal()):
        raise SpecError(f"{text!r} is not a component.", hint="Write it as NAME=LENGTH, for example word=16.")
    return {"name": name, "max_sequence_length": int(length)}


def _target_option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise SpecError(f"{text!r} is not a target option.", hint="Write it as NAME=VALUE.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
