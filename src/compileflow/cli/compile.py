"""compile: the command whose options become a CompileRequest, built around the function that runs requests.

`compileflow compile` runs them in this process; `python -m flows compile` runs the same requests as Prefect flows.
A new option is a parameter of `_compile`, and an entry of its request.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from compileflow.cli.common import (
    FAILED,
    WRONG_REQUEST,
    error_values,
    exit_code,
    one_line_errors,
    print_report,
    stop,
)
from compileflow.cli.output import say, say_json, say_lines
from compileflow.cli.request_fields import (
    bucket_of,
    checked_request,
    component_of,
    in_options,
    memory_bytes,
    model_of,
    notes_on,
    refuse_idle_calibration,
    refuse_without_effect,
    steps_without,
    target_options_of,
    targets_of,
)
from compileflow.errors import CompileflowError, SourceError, SpecError
from compileflow.spec import TASK_ALIASES, HfTask, Precision

if TYPE_CHECKING:
    from compileflow.steps.request import CompileRequest
    from compileflow.steps.run import CompileResult

_MODEL, _TARGET, _SHAPES = "Model", "Target", "Precision and shapes"
_VALIDATION, _STORES, _RUN = "Validation", "Stores and registries", "Run"
# Options without a panel come first in the help: the five that a newcomer needs.
_TARGET_HELP = (
    "Target to compile for, or auto, which tries all targets. Repeatable. Default: onnx-runtime. "
    "List: compileflow targets."
)
_MODEL_HELP = (
    "A model folder, a GGUF file, a Hub id (owner/name), or a registered version, for example registry:NAME@STAGE."
)


class Runner(Protocol):
    """A function that runs requests, each one on its own."""

    def __call__(
        self, requests: Sequence[CompileRequest], *, progress: bool
    ) -> list[CompileResult | CompileflowError]:
        """Return the result of each run, or its error.

        Args:
            requests: The requests, in order.
            progress: Whether to show progress.
        """


def compile_command(
    runner: Runner, *, without: Collection[str] = (), extras: Collection[str] = ()
) -> Callable[..., None]:
    """Return the command, for typer to register.

    Args:
        runner: Runs the requests.
        without: Names of parameters that the command does not have.
        extras: Extras of compileflow that the runner needs.
    """

    def command(**options: Any) -> None:
        _compile(partial(run_and_print, runner, extras=extras), **options)

    signature = inspect.signature(_compile, eval_str=True)
    parameters = [parameter for name, parameter in signature.parameters.items() if name not in {"run", *without}]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__doc__ = _compile.__doc__
    return one_line_errors(command)


def run_here(requests: Sequence[CompileRequest], *, progress: bool) -> list[CompileResult | CompileflowError]:
    """Run requests in this process, without Prefect."""
    from compileflow.cli.progress import progress_display
    from compileflow.selection.run import run_any_target
    from compileflow.settings import get_settings

    settings = get_settings()
    outcomes: list[CompileResult | CompileflowError] = []
    for request in requests:
        prefix = f"{request.target}: " if len(requests) > 1 else ""
        with progress_display(progress, prefix=prefix) as display:
            try:
                outcomes.append(run_any_target(request, settings, progress=display))
            except CompileflowError as error:
                outcomes.append(error)
    return outcomes


def run_and_print(
    runner: Runner,
    requests: Sequence[CompileRequest],
    *,
    progress: bool = True,
    verbose: bool = False,
    as_json: bool = False,
    extras: Collection[str] = (),
) -> list[CompileResult]:
    """Check and run requests, and print the results and errors; exits if one failed.

    Args:
        runner: Runs the requests that can run.
        requests: The requests, in order.
        progress: Whether to show progress.
        verbose: Print the end of the log that belongs to an error.
        as_json: Print a JSON list with the result or the error of each request.
        extras: Extras of compileflow that the runner needs.
    """
    refusals = [_refusal(request, extras) for request in requests]
    accepted = [request for request, refusal in zip(requests, refusals, strict=True) if refusal is None]
    try:
        outcomes = iter(runner(accepted, progress=progress) if accepted else ())
    except KeyboardInterrupt as error:
        stop(error, "Finished steps are kept; run the command again to do the rest.")
    merged = [refusal or next(outcomes) for refusal in refusals]
    print_outcomes(requests, merged, verbose=verbose, as_json=as_json)
    errors = [outcome for outcome in merged if isinstance(outcome, CompileflowError)]
    exit_codes = {WRONG_REQUEST if _is_wrong(error, refusals) else exit_code(error) for error in errors}
    if exit_codes:
        raise typer.Exit(exit_codes.pop() if len(exit_codes) == 1 else FAILED)
    return [outcome for outcome in merged if not isinstance(outcome, CompileflowError)]


def _refusal(request: CompileRequest, extras: Collection[str]) -> CompileflowError | None:
    from compileflow.selection.run import check_any_target
    from compileflow.settings import get_settings

    try:
        check_any_target(request, get_settings(), extras=extras)
    except CompileflowError as error:
        return error
    return None


def _is_wrong(error: CompileflowError, refusals: Sequence[CompileflowError | None]) -> bool:
    """Return whether the request is wrong: a run that was not refused may find the same kinds of error itself."""
    return error in refusals and isinstance(error, SpecError | SourceError)


def print_outcomes(
    requests: Sequence[CompileRequest],
    outcomes: Sequence[CompileResult | CompileflowError],
    *,
    verbose: bool,
    as_json: bool,
    wording: Callable[[str], str] = in_options,
) -> None:
    """Print results on standard output, and errors on standard error; with `as_json`, also as one JSON list.

    Args:
        requests: The requests.
        outcomes: The result or the error of each request.
        verbose: Print the end of the log that belongs to an error.
        as_json: Print a JSON list.
        wording: Turns the words of an error into those that the user knows.
    """
    from compileflow.cli.results import log_tail, print_results

    results = [outcome for outcome in outcomes if not isinstance(outcome, CompileflowError)]
    if as_json:
        values = [_values(*pair, wording) for pair in zip(requests, outcomes, strict=True)]
        say_json(values)
    elif results:
        print_results(results)
    for error in outcomes:
        if isinstance(error, CompileflowError):
            if verbose and error.log_path:
                say_lines(log_tail(error.log_path), err=True)
            say(f"error: {wording(str(error))}", err=True)
            print_report(error)


def _values(
    request: CompileRequest, outcome: CompileResult | CompileflowError, wording: Callable[[str], str]
) -> dict[str, Any]:
    if not isinstance(outcome, CompileflowError):
        return outcome.model_dump(mode="json")
    error = {name: wording(text) for name, text in error_values(outcome).items()}
    return {"target": request.target, "precision": request.precision.value, "error": error}


def _complete_target(incomplete: str) -> list[str]:
    from compileflow.catalog import target_names

    return [name for name in ("auto", *target_names()) if name.startswith(incomplete)]


def _complete_task(incomplete: str) -> list[str]:
    return [name for name in (*HfTask, *TASK_ALIASES) if name.startswith(incomplete)]


def _complete_precision(incomplete: str) -> list[str]:
    return [precision.value for precision in Precision if precision.startswith(incomplete)]


def _compile(
    run: Callable[..., object],
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=_MODEL_HELP, show_default=False)] = None,
    target: Annotated[list[str] | None, typer.Option(help=_TARGET_HELP, autocompletion=_complete_target)] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help=f"Hub task: {', '.join(HfTask)}; or an alias: {', '.join(TASK_ALIASES)}. Default: the task of "
            "the registered version, else detected from the model's architecture.",
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
        typer.Option(
            help="Your own examples for the validation, with or without labels: a text file with one example per "
            "line, a JSON-lines or CSV file, or a folder of images or recordings."
        ),
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
        str | None,
        typer.Option(
            help="With auto: choose by latency, throughput or size. Default: latency.", rich_help_panel=_TARGET
        ),
    ] = None,
    max_accuracy_loss: Annotated[
        float | None,
        typer.Option(help="With auto: share of decisions that may change, 0 to 1.", rich_help_panel=_TARGET),
    ] = None,
    max_memory_mb: Annotated[
        float | None,
        typer.Option(
            help="With auto: serving memory budget in MB (1 MB = 10**6 bytes), for the peak of calls at the timed "
            "shapes.",
            rich_help_panel=_TARGET,
        ),
    ] = None,
    max_sequence_length: Annotated[
        int | None,
        typer.Option(
            help="Longest input in tokens (audio: samples). Default: the model's maximum; for audio, 30 seconds.",
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
    max_examples: Annotated[
        int | None,
        typer.Option(help="Maximum number of examples to compare. Default: 400.", rich_help_panel=_VALIDATION),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option(
            help="Allow a tenth as many changed decisions: 0.1 % where 1 % is allowed. A pass needs about 2,700 "
            "examples.",
            rich_help_panel=_VALIDATION,
            show_default=False,
        ),
    ] = False,
    suite: Annotated[
        str | None,
        typer.Option(
            help="YAML file with gates of your own, which are judged in addition to compileflow's gates.",
            rich_help_panel=_VALIDATION,
        ),
    ] = None,
    tests: Annotated[
        str | None,
        typer.Option(
            help="Folder of your own pytest tests, which run with your rights. One that fails blocks the model.",
            rich_help_panel=_VALIDATION,
        ),
    ] = None,
    data_docs: Annotated[
        bool,
        typer.Option(
            help="Write the page of Great Expectations (Data Docs) beside the report.",
            rich_help_panel=_VALIDATION,
            show_default=False,
        ),
    ] = False,
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
        bool, typer.Option(help="Show the progress of each step.", rich_help_panel=_RUN, show_default=False)
    ] = True,
    verbose: Annotated[
        bool,
        typer.Option(
            help="After an error, print the end of the toolchain's log.", rich_help_panel=_RUN, show_default=False
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the results and errors as JSON.", rich_help_panel=_RUN)
    ] = False,
) -> None:
    """Compile a model, validate it, store it and register it. Each target is one run.

    Exit codes: 0 success, 1 a run failed, 2 the request is wrong or the model cannot be used, 130 interrupted, 143
    terminated.
    """
    targets = targets_of(target or ())
    refuse_without_effect(
        targets,
        skip or (),
        auto={
            "--among": among,
            "--objective": objective,
            "--max-accuracy-loss": max_accuracy_loss,
            "--max-memory-mb": max_memory_mb,
        },
        validate={
            "--examples": examples,
            "--shape": shape,
            "--max-examples": max_examples,
            "--strict": strict or None,
            "--suite": suite,
            "--tests": tests,
            "--data-docs": data_docs or None,
            "--max-latency-ratio": max_latency_ratio,
        },
    )
    fields: dict[str, Any] = {
        "model": model_of(model, model_option),
        "revision": revision,
        "hf_task": task,
        "precision": precision or Precision.FP32,
        "max_sequence_length": max_sequence_length,
        "shape_buckets": [bucket_of(text) for text in bucket or ()],
        "components": [component_of(text) for text in component or ()],
        "target_options": target_options_of(option or ()),
        "trust_remote_code": trust_remote_code,
        "name": name,
        "allow_warn": allow_warn,
        "calibration": {"examples_path": calibration},
        "auto": {
            "objective": {
                "goal": objective or "latency",
                "max_accuracy_loss": max_accuracy_loss,
                "max_serving_memory_bytes": memory_bytes(max_memory_mb),
            },
            "targets": among or (),
            "precisions": [precision] if precision else (),
        },
        "validation": {
            "examples_path": examples,
            "suite_path": suite,
            "tests_path": tests,
            "data_docs": data_docs,
            "strict": strict,
            "max_latency_ratio": max_latency_ratio,
            "latency_shapes": [bucket_of(text) for text in shape or ()],
            **({} if max_examples is None else {"max_examples": max_examples}),
        },
        "store_uri": store,
        "registry_uris": registry or (),
        "aws_credentials_block": aws_credentials_block,
        "steps": steps_without(skip or ()),
    }
    requests = [checked_request(fields | ({"target": chosen} if chosen else {})) for chosen in targets or [""]]
    if calibration is not None:
        refuse_idle_calibration(requests)
    for note in notes_on(requests) if progress else ():
        say(note, err=True)
    run(requests, progress=progress, verbose=verbose, as_json=as_json)
