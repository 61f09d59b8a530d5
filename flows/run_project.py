"""run: the command that runs a project, whole or one step of it: python -m flows run PROJECT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from compileflow.cli.common import one_line_errors
from compileflow.cli.compile import run_and_print
from compileflow.cli.output import say
from compileflow.errors import CompileflowError, SpecError, StepOffError
from compileflow.settings import Settings, get_settings
from flows.environment import set_embedded_defaults

if TYPE_CHECKING:
    from compileflow.steps.request import CompileRequest, StepSwitches
    from compileflow.steps.run import CompileResult


# The steps in their order, by the names that the older component gave them.
STEPS = {
    "download-model": "fetch",
    "compile-model": "compile",
    "validate-model": "validate",
    "upload-model": "register",
}


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
    from flows.projects import load_project

    settings = get_settings()
    if task is not None and from_environment:
        raise SpecError("--task and --from-environment both choose the steps.", hint="Give one of them.")
    steps = steps_from(settings) if from_environment else steps_of(task)
    loaded_project = load_project(project)
    request = loaded_project.request_for(steps, model or settings.project_model)
    written: list[str] = []

    def run_recorded(
        requests: Sequence[CompileRequest], *, progress: bool
    ) -> list[CompileResult | CompileflowError]:
        server = set_embedded_defaults(settings, progress=progress)
        # Prefect reads its settings when it is imported.
        from flows.outputs import Outputs
        from flows.runner import run_requests

        outputs = Outputs(loaded_project.name, request, settings)
        with outputs.recording():
            (outcome,) = run_requests(requests, server)
        if isinstance(outcome, StepOffError):
            outcome = _with_missing_task(outcome, project)
        error = outcome if isinstance(outcome, CompileflowError) else None
        written.extend(str(folder) for folder in outputs.write(error))
        return [outcome]

    try:
        run_and_print(
            run_recorded, [request], progress=progress, verbose=verbose, as_json=as_json, extras=("prefect",)
        )
    finally:
        for folder in written if not as_json else ():
            say(f"outputs: {folder}")


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


def _with_missing_task(error: StepOffError, project: str) -> StepOffError:
    """Return the error of a step without its input, with the task that makes the input."""
    task = next(name for name, step in STEPS.items() if error.message.startswith(f"The {step} step is off"))
    return StepOffError(error.message, hint=f"Run first: python -m flows run {project} --task {task}")
