"""publish: create the Prefect artifacts of a run: a report, a table of figures, a link."""

from __future__ import annotations

from prefect import task
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE

from compileflow.steps.request import CompileRequest
from compileflow.steps.summary import figures_table, summary_markdown
from compileflow.steps.values import CompiledArtifact, FetchedSource, ValidatedArtifact
from tasks.policies import prefect_key


@task(name="publish", description="Show the outcome in the Prefect UI.", cache_policy=NO_CACHE)
def publish(
    source: FetchedSource, artifact: CompiledArtifact, validated: ValidatedArtifact, request: CompileRequest
) -> None:
    """Create three Prefect artifacts. Their keys name model and target, so that the UI shows their history."""
    key = prefect_key(request.name, source.uri, request.target)
    create_markdown_artifact(summary_markdown(source, artifact, validated), key=f"{key}-report")
    create_table_artifact(figures_table(artifact, validated), key=f"{key}-figures")
    create_link_artifact(artifact.uri, link_text=f"artifact {artifact.digest[:12]}", key=f"{key}-artifact")
