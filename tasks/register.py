"""register: register the proven artifact as a version in a model registry."""

from __future__ import annotations

from prefect import get_run_logger, task
from prefect.runtime import flow_run

from compileflow.contracts import ModelVersion, without_credentials
from compileflow.steps.register import find_version, register_version
from compileflow.steps.request import CompileRequest
from compileflow.steps.summary import version_line
from compileflow.steps.values import CompiledArtifact, FetchedSource, ValidatedArtifact
from tasks.policies import RETRIES, prefect_key
from tasks.publish import link_version
from tasks.settings import settings_for


@task(name="register", description="Register the proven artifact in one registry.", **RETRIES)
def register(
    source: FetchedSource,
    artifact: CompiledArtifact,
    validated: ValidatedArtifact,
    request: CompileRequest,
    registry_uri: str,
) -> ModelVersion:
    """Return the version: a new one, or the one that holds this artifact already."""
    settings = settings_for(request)
    version = register_version(
        source,
        artifact,
        validated,
        name=request.name,
        allow_warn=request.allow_warn,
        store_uri=settings.resolved_store_uri(request.store_uri),
        registry_uri=registry_uri,
        settings=settings,
        flow_run_id=flow_run.id,
    )
    get_run_logger().info("registered: %s", version_line(version, registry_uri))
    link_version(version, registry_uri, key=prefect_key(request.name, source.uri, request.target, "version"))
    return version


@task(name="look up version", description="Find the registered version; the register step is off.", **RETRIES)
def look_up(
    source: FetchedSource, artifact: CompiledArtifact, request: CompileRequest, registry_uri: str
) -> ModelVersion | None:
    """Return the version that holds the artifact already, or None."""
    version = find_version(
        source, artifact, name=request.name, registry_uri=registry_uri, settings=settings_for(request)
    )
    line = version_line(version, registry_uri) if version else f"none in {without_credentials(registry_uri)}"
    get_run_logger().info("the register step is off; registered before: %s", line)
    return version
