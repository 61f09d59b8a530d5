"""settle: validate an artifact whose verdict is pending-device, on a machine with the device, and register it."""

from __future__ import annotations

from typing import Annotated

import typer

from compileflow.cli.common import AsJson, artifact_location, one_line_errors
from compileflow.cli.output import say, say_json


@one_line_errors
def settle(
    artifact: Annotated[str, typer.Argument(help="URI or digest of an artifact with the verdict pending-device.")],
    registry: Annotated[
        list[str] | None,
        typer.Option(
            help="URI of a registry. Repeatable. Default: those of the compile, if they are configured here too."
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option(help="Run Python files that come with the model, with your rights.", show_default=False)
    ] = False,
    progress: Annotated[bool, typer.Option(help="Show the progress.", show_default=False)] = True,
    as_json: AsJson = False,
) -> None:
    """Validate an artifact that was compiled without its device, and register it if its verdict allows.

    The store is enough: it holds the answers of the source model. Latency is not compared.
    """
    from compileflow.cli.progress import progress_display
    from compileflow.settings import get_settings
    from compileflow.steps.settle import register_settled, settle_artifact
    from compileflow.steps.summary import verdict_line, version_line

    settings = get_settings()
    uri = artifact_location(artifact)
    with progress_display(progress) as display, display.step("settle") as show:
        settled = settle_artifact(
            uri,
            settings=settings,
            timeout_s=3600,
            registry_uris=registry or (),
            trust_remote_code=trust_remote_code,
            on_progress=show,
        )
        show(verdict_line(settled.validated))
    versions = register_settled(settled, settings)
    if as_json:
        values = {name: version.model_dump(mode="json") for name, version in versions.items()}
        say_json({"verdict": settled.validated.outcome, "versions": values})
        return
    say(f"{settled.validated.outcome}: {settled.validated.reason.partition(': ')[2]}")
    for registry_uri, version in versions.items():
        say(f"version: {version_line(version, registry_uri)}")
