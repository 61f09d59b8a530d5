"""publish: create the Prefect artifacts of a run: a report, a picture, a table of figures, and links."""

from __future__ import annotations

import base64

from prefect import task
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)
from prefect.cache_policies import NO_CACHE

from compileflow.contracts import ModelVersion, without_credentials
from compileflow.settings import Settings
from compileflow.steps.report_file import export_picture, export_report, read_report
from compileflow.steps.request import CompileRequest
from compileflow.steps.summary import figures_table, summary_markdown
from compileflow.steps.values import CompiledArtifact, FetchedSource, ValidatedArtifact
from tasks.policies import prefect_key
from tasks.server import patiently
from tasks.settings import settings_for


@task(name="publish", description="Show the outcome in the Prefect UI.", cache_policy=NO_CACHE)
def publish(
    source: FetchedSource, artifact: CompiledArtifact, validated: ValidatedArtifact, request: CompileRequest
) -> None:
    """Create the Prefect artifacts. Their keys name model and target, so that the UI shows their history."""
    key = prefect_key(request.name, source.uri, request.target)
    settings = settings_for(request)
    page = export_report(validated.report_uri, settings).as_uri()
    report = read_report(validated.report_uri, settings)
    text = summary_markdown(source, artifact, validated, report=report, page=page)
    patiently(
        create_markdown_artifact,
        text + _picture(validated.report_uri, settings),
        key=f"{key}-report",
        description=validated.reason,
    )
    patiently(
        create_table_artifact,
        figures_table(artifact, validated),
        key=f"{key}-figures",
        description="Figures of the compile and the proof",
    )
    links = {"artifact": (artifact.uri, artifact.digest), "report-page": (page, validated.report_digest)}
    for name, (uri, digest) in links.items():
        patiently(
            create_link_artifact,
            uri,
            link_text=f"{name} {digest[:12]}",
            key=f"{key}-{name}",
            description=uri,
        )


def link_version(version: ModelVersion, registry_uri: str, *, key: str) -> None:
    """Create the Prefect artifact that names a registered version and its registry."""
    name = f"{version.name} version {version.version}"
    patiently(
        create_link_artifact,
        without_credentials(registry_uri),
        link_text=name,
        key=key,
        description=f"{name}, verdict {version.verdict}",
    )


def _picture(report_uri: str, settings: Settings) -> str:
    """Return the picture of a report as Markdown; "" on a worker without the extra validation."""
    try:
        picture = export_picture(report_uri, settings).read_bytes()
    except ImportError:
        return ""
    return f"\n\n![picture](data:image/png;base64,{base64.b64encode(picture).decode()})"
