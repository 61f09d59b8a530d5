"""run: the command that runs a project, whole or one step of it: python -m flows run PROJECT."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compileflow.cli.common import exit_code, one_line_errors, stop
from compileflow.cli.compile import print_outcomes
from compileflow.cli.output import say
from compileflow.errors import CompileflowError, SpecError, StepOffError
from compileflow.settings import Settings, get_settings
from flows.environment import set_embedded_defaults

if TYPE_CHECKING:
    from compileflow.steps.request import CompileRequest, StepSwitches
    from compileflow.steps.run import CompileResult
    from flows.outputs import Outputs


# The steps in their order, by the names that the older component gave them.
STEPS = {
    "download-model": "fetch",
    "compile-model": "compile",
    "validate-model": "validate",
    "upload-model": "register",
}
# What messages of the library name, by the field of a project file.
_FIELDS = {
    "--examples": "validation.examples_path",
    "--suite": "validation.suite_path",
    "tests_path": "validation.tests_path",
    "--calibration": "calibration.examples_path",
}
_OPTION = re.compile(rf"(?<![\w./-])({'|'.join(_FIELDS)})(?![\w/-])")


@one_line_errors
def run(
    project: Annotated[
        str,
        typer.Argument(
            metavar="PROJECT", help="Name of a file in deployments/projects, or the path of another project file."
        ),
    ],
    task: Annotated[
        str | None,
        typer.Option(
            help=f"The only step to run: {', '.join(STEPS)}. It starts from the results of earlier "
            "steps. Default: all."
        ),
    ] = None,
    from_environment: Annotated[
        bool,
        typer.Option(
            help="Run the steps whose switches COMPILE_PIPELINE_EXECUTION_DOWNLOAD, _COMPILE, _TEST and _UPLOAD "
            "are true.",
            show_default=False,
        ),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model to use instead of the project's own, for example a folder with a copy of it. Default: the "
            "setting COMPILEFLOW_PROJECT_MODEL, else the project's own."
        ),
    ] = None,
    progress: Annotated[bool, typer.Option(help="Show the progress of each step.", show_default=False)] = True,
    verbose: Annotated[
        bool, typer.Option(help="After an error, print the end of the toolchain's log.", show_default=False)
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result or the error as JSON.")] = False,
) -> None:
    """Run a project: download its model, compile it, validate it, upload it. Each step fills a folder of outputs.

    Exit codes: 0 success, 1 the run failed, 2 the project or the model is wrong, 130 interrupted, 143 terminated.
    """
    from flows.outputs import Outputs
    from flows.projects import load_project

    settings = get_settings()
    if task is not None and from_environment:
        raise SpecError("--task and --from-environment both choose the steps.", hint="Give one of them.")
    steps = steps_from(settings) if from_environment else steps_of(task)
    loaded_project = load_project(project)
    request = loaded_project.request_for(steps, model or settings.project_model)
    outputs = Outputs(loaded_project.name, request, settings)
    outputs.clear()
    outcome: CompileResult | CompileflowError
    try:
        outcome = _run_recorded(request, outputs, progress=progress)
    except KeyboardInterrupt as error:
        stop(error, "Finished steps are kept; run the command again to do the rest.")
    except CompileflowError as error:
        outcome = error
    if isinstance(outcome, StepOffError):
        outcome = _with_missing_task(outcome, project, model)
    if isinstance(outcome, CompileflowError):
        outcome = _in_fields(outcome, loaded_project.path)
    folders = outputs.write(outcome if isinstance(outcome, CompileflowError) else None)
    # `_in_fields` has put the error in the words of the file.
    print_outcomes([request], [outcome], verbose=verbose, as_json=as_json, wording=str)
    for folder in folders if not as_json else ():
        say(f"outputs: {folder}")
    if isinstance(outcome, CompileflowError):
        raise typer.Exit(exit_code(outcome))


def _run_recorded(
    request: CompileRequest, outputs: Outputs, *, progress: bool
) -> CompileResult | CompileflowError:
    """Check and run a request, and return its result or its error.

    Raises:
        CompileflowError: The request is refused before it runs, or Prefect cannot run it.
    """
    from compileflow.selection.run import check_any_target

    settings = get_settings()
    check_any_target(request, settings, extras=("prefect",))
    server = set_embedded_defaults(settings, progress=progress)
    # Prefect reads its settings when it is imported.
    from flows.runner import run_requests

    with outputs.recording():
        (outcome,) = run_requests([request], server)
    return outcome


def steps_of(task: str | None) -> StepSwitches:
    """Return the switches that leave only the step of a task on; all of them for None.

    Raises:
        SpecError: The task is unknown.
    """
    from compileflow.steps.request import StepSwitches

    if task is not None and task not in STEPS:
        raise SpecError(f"Unknown task {task!r}.", hint=f"Choose one of: {', '.join(STEPS)}.")
    return StepSwitches(**{step: task in (None, name) for name, step in STEPS.items()})


def steps_from(settings: Settings) -> StepSwitches:
    """Return the switches of the steps that the environment switches on.

    Raises:
        SpecError: It switches none on.
    """
    from compileflow.steps.request import StepSwitches

    switches = (
        settings.execute_download,
        settings.execute_compile,
        settings.execute_test,
        settings.execute_upload,
    )
    if not any(switches):
        raise SpecError(
            "No step is switched on.",
            hint="Set COMPILE_PIPELINE_EXECUTION_DOWNLOAD, _COMPILE, _TEST or _UPLOAD to true.",
        )
    return StepSwitches(**dict(zip(STEPS.values(), switches, strict=True)))


def _with_missing_task(error: StepOffError, project: str, model: str | None) -> StepOffError:
    """Return the error of a step without its input, with the command that makes the input."""
    task = next(name for name, step in STEPS.items() if error.message.startswith(f"The {step} step is off"))
    words = ["python", "-m", "flows", "run", project, *(("--model", model) if model else ()), "--task", task]
    return StepOffError(error.message, hint=f"Run first: {shlex.join(words)}")


def _in_fields(error: CompileflowError, path: Path) -> CompileflowError:
    """Return an error with fields of the project file in the place of options that this command does not have."""
    values = {
        name: _OPTION.sub(lambda match: f"{_FIELDS[match[0]]} of {path}", text)
        for name, text in error.to_dict().items()
        if name in ("message", "hint")
    }
    return CompileflowError.from_dict(error.to_dict() | values)
