"""import-older: prove a pipeline that the older library saved, and store it as an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compileflow.cli.common import AsJson, one_line_errors
from compileflow.cli.output import say, say_json


@one_line_errors
def import_older(
    folder: Annotated[
        str,
        typer.Argument(help="Folder with pipeline, compiled_tokenizer, compiled_model and pipeline_task.json."),
    ],
    out: Annotated[
        str | None, typer.Option(help="Also copy the artifact into this folder, which must be empty or absent.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare the compiled model in a folder of the older library with the uncompiled pipeline beside it.

    The compiled model is stored as an artifact with its verdict. Nothing is compiled again. The exit code is 0
    only if the verdict is pass or warn.
    """
    from compileflow.artifact.open import copy_artifact, open_artifact
    from compileflow.cli.progress import progress_display
    from compileflow.contracts import ACCEPTED_OUTCOMES
    from compileflow.errors import VerdictError
    from compileflow.settings import get_settings
    from compileflow.steps.import_older import import_older as import_and_prove
    from compileflow.steps.report_file import export_report

    settings = get_settings()
    with progress_display(not as_json) as display, display.step("import") as show:
        artifact, validated = import_and_prove(Path(folder), settings=settings, on_progress=show)
    if validated.outcome not in ACCEPTED_OUTCOMES:
        raise VerdictError(
            f"The compiled model in {folder} does not answer like its uncompiled pipeline: {validated.reason}.",
            hint=f"Compile the uncompiled pipeline again: compileflow compile {Path(folder) / 'pipeline'}",
            report_uri=validated.report_uri,
        )
    if out is not None:
        copy_artifact(open_artifact(artifact.uri, settings=settings, require_signature=False), out)
    report = export_report(validated.report_uri, settings)
    if as_json:
        values = {
            "artifact": artifact.model_dump(mode="json"),
            "validated": validated.model_dump(mode="json"),
            "report": str(report),
            "folder": out,
        }
        say_json(values)
        return
    say(f"verdict: {validated.reason}")
    say(f"artifact: {artifact.uri}")
    say(f"report: {report}")
    if out is not None:
        say(f"folder: {out}")
