"""Run flows from the command line: python -m flows compile --model PATH_OR_HUB_ID --target TARGET."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from compileflow.catalog import target_names
from compileflow.errors import CompileflowError, SpecError, first_problem
from compileflow.selection.comparison import plot_text
from compileflow.selection.comparison_file import export_comparison, read_comparison
from compileflow.settings import get_settings
from compileflow.spec import TARGET_ALIASES, HfTask, Precision
from compileflow.steps.report_file import export_report
from compileflow.steps.request import AUTO, CompileRequest
from flows.environment import set_embedded_defaults

if TYPE_CHECKING:
    from flows.compile_model import CompileResult

_LOG_LINES = 60
_WIDTH = 140

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Run compileflow's Prefect flows."""


@app.command("compile")
def compile_command(
    model: Annotated[
        str, typer.Option(help="A model folder, a Hub id as owner/name, or a registered version's URI.")
    ],
    target: Annotated[
        list[str] | None,
        typer.Option(help=f"Repeat for several: {', '.join(target_names())}; or auto, which tries all."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")] = None,
    task: Annotated[str | None, typer.Option(help=f"{', '.join(HfTask)}. Default: the model's own.")] = None,
    precision: Annotated[
        str | None, typer.Option(help=f"{', '.join(Precision)}. Default: fp32; with auto, all.")
    ] = None,
    max_sequence_length: Annotated[int | None, typer.Option(help="Tokens. Default: the model's own.")] = None,
    bucket: Annotated[
        list[str] | None, typer.Option(help="Shape bucket as BATCHxTOKENS, for example 1x128. Repeat.")
    ] = None,
    component: Annotated[
        list[str] | None,
        typer.Option(help="NAME=TOKENS: one of several lengths in one artifact, sharing the weights. Repeat."),
    ] = None,
    option: Annotated[list[str] | None, typer.Option(help="Target option as NAME=JSON. Repeat.")] = None,
    name: Annotated[str | None, typer.Option(help="Name in the registry.")] = None,
    examples: Annotated[str | None, typer.Option(help="Natural examples: one a line, or a folder.")] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Other natural examples, for static int8, one a line.")
    ] = None,
    objective: Annotated[str, typer.Option(help="What auto chooses by: latency, throughput or size.")] = "latency",
    max_accuracy_loss: Annotated[
        float | None, typer.Option(help="With auto: share of decisions that may change, 0 to 1.")
    ] = None,
    max_memory_mb: Annotated[
        float | None, typer.Option(help="With auto: most memory in serving, 10**6 bytes.")
    ] = None,
    among: Annotated[list[str] | None, typer.Option(help="With auto: only this target. Repeat.")] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help="Time at BATCHxTOKENS; the first is the headline. Repeat.")
    ] = None,
    max_latency_ratio: Annotated[float | None, typer.Option(help="Latency gate against eager.")] = None,
    allow_warn: Annotated[bool, typer.Option(help="Register a verdict of warn, too.")] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="Run the model's own Python files.")] = False,
    skip: Annotated[list[str] | None, typer.Option(help="Switch a step off. Repeat.")] = None,
    store: Annotated[str | None, typer.Option(help="Artifact store's URI.")] = None,
    registry: Annotated[
        list[str] | None, typer.Option(help="Registry's URI. Repeat for several; the first is read.")
    ] = None,
    aws_credentials_block: Annotated[
        str | None, typer.Option(help="Name of a Prefect AwsCredentials block, for S3.")
    ] = None,
    progress: Annotated[
        bool | None, typer.Option(help="Print a line a step. Default: when on a terminal.")
    ] = None,
    verbose: Annotated[bool, typer.Option(help="After an error, print what the toolchain said.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Compile a model, prove it, store it and register it; one run a target."""
    raw: dict[str, Any] = {
        "model": model,
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
    }
    shown = sys.stderr.isatty() if progress is None else progress
    try:
        raw["shape_buckets"] = [_bucket(text) for text in bucket or ()]
        raw["components"] = [_component(text) for text in component or ()]
        raw["validation"] = {
            "examples_path": examples,
            "max_latency_ratio": max_latency_ratio,
            "latency_shapes": [_bucket(text) for text in shape or ()],
        }
        raw["target_options"] = dict(_option(text) for text in option or ())
        raw["steps"] = dict.fromkeys(skip or (), False)
        requests = [_request(raw | {"target": each}) for each in target or ["onnx-runtime"]]
        set_embedded_defaults(get_settings(), progress=shown)
    except CompileflowError as error:
        _refuse(error)
    _run(requests, as_json=as_json, verbose=verbose)


@app.command()
def demo() -> None:
    """Compile all-MiniLM-L6-v2 for two targets, prove and register it, and show how to load it."""
    from flows.demo import NAME, TARGETS, demo_model, loading_lines

    try:
        model = str(demo_model())
        set_embedded_defaults(get_settings(), progress=True)
    except CompileflowError as error:
        _refuse(error)
    results = _run([_request({"model": model, "target": target, "name": NAME}) for target in TARGETS])
    typer.echo("\nload it in Python:\n")
    typer.echo(loading_lines(results[0].artifact.uri))


def _run(
    requests: list[CompileRequest],
    *,
    as_json: bool = False,
    verbose: bool = False,
) -> list[CompileResult]:
    """Run the requests and print what came of them; exits with 1 when one failed."""
    from flows.runner import run_requests

    try:
        results, errors = run_requests(requests)
    except KeyboardInterrupt as error:
        typer.echo("Interrupted; nothing half-made was kept. Run again to go on.", err=True)
        raise typer.Exit(130) from error
    if as_json:
        typer.echo(json.dumps([result.model_dump(mode="json") for result in results], indent=1))
    elif results:
        _print_table(results)
    for error in errors:
        if verbose and error.log_path:
            typer.echo(_tail(error.log_path), err=True)
        typer.echo(f"error: {error}", err=True)
    if errors:
        raise typer.Exit(1)
    return results


def _request(raw: dict[str, Any]) -> CompileRequest:
    choices = (AUTO, *target_names())
    if raw["target"] not in (*choices, *TARGET_ALIASES):
        raise SpecError(f"Unknown target {raw['target']!r}.", hint=f"Choose one of: {', '.join(choices)}.")
    try:
        return CompileRequest.model_validate(raw)
    except ValidationError as error:
        raise SpecError(f"{first_problem(error, show_input=True)}.") from error


def _bucket(text: str) -> dict[str, int]:
    batch_size, cross, length = text.partition("x")
    if not (cross and batch_size.isdecimal() and length.isdecimal()):
        raise SpecError(f"{text!r} is no shape bucket.", hint="Write it as BATCHxTOKENS, for example 1x128.")
    return {"batch_size": int(batch_size), "sequence_length": int(length)}


def _component(text: str) -> dict[str, Any]:
    name, equals, length = text.partition("=")
    if not (equals and length.isdecimal()):
        raise SpecError(f"{text!r} is no component.", hint="Write it as NAME=TOKENS, for example word=16.")
    return {"name": name, "max_sequence_length": int(length)}


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise SpecError(f"{text!r} is no target option.", hint="Write it as NAME=VALUE.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _print_table(results: list[CompileResult]) -> None:
    # Where nobody sets a width, lines are cut at 80 characters.
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    for result in results:
        if result.comparison_uri is not None:
            _print_comparison(result.comparison_uri, console)
    table = Table(title="compileflow")
    for column in ("target", "precision", "verdict", "latency / eager", "size", "compile", "registered as"):
        table.add_column(column, overflow="fold")
    for result in results:
        table.add_row(*_row(result))
    console.print(table)
    for result in results:
        lines = [("artifact", result.artifact.uri)]
        if result.validated is not None:
            lines.append(("report", str(export_report(result.validated.report_uri, get_settings()))))
        for uri, version in result.versions.items():
            lines.append(("registry", f"{uri} has it as {version.name} version {version.version}"))
        for what, where in lines:
            console.print(f"{result.target} {what}: {where}", soft_wrap=True, highlight=False)


def _print_comparison(uri: str, console: Console) -> None:
    comparison = read_comparison(uri)
    table = Table(title="candidates")
    for column in comparison.comparison_header():
        table.add_column(column, overflow="fold")
    for row in comparison.comparison_rows():
        table.add_row(*row)
    console.print(table)
    console.print(plot_text(comparison), soft_wrap=True, highlight=False, markup=False)
    plot = export_comparison(uri, get_settings())
    for line in (*comparison.comparison_notes(), f"chosen: {comparison.reason}", f"plot: {plot}"):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _tail(log_path: str) -> str:
    """Return the last lines of a log; toolchains print thousands."""
    try:
        lines = Path(log_path).read_text("utf-8", "replace").splitlines()
    except OSError as error:
        return f"{log_path}: {error.strerror}"
    return "\n".join(lines[-_LOG_LINES:])


def _row(result: CompileResult) -> tuple[str, ...]:
    figures = result.validated.figures if result.validated else {}
    ratio = figures.get("latency_ratio")
    interval = f"{figures.get('latency_ratio_low', 0):.2f} to {figures.get('latency_ratio_high', 0):.2f}"
    version = result.version
    return (
        result.target,
        result.precision.value,
        result.validated.outcome if result.validated else "not asked",
        f"{ratio:.2f} ({interval})" if ratio else "not timed",
        f"{result.artifact.size_bytes / 1e6:.1f} MB",
        "cached" if result.artifact.cached else f"{result.artifact.compile_duration_s:.1f} s",
        f"{version.name} version {version.version}" if version else "not registered",
    )


def _refuse(error: CompileflowError) -> NoReturn:
    typer.echo(f"error: {error}", err=True)
    raise typer.Exit(2)


if __name__ == "__main__":
    app()
