"""register: make the proven artifact a version in a model registry."""

from __future__ import annotations

from prefect import get_run_logger, task
from prefect.runtime import flow_run

from compileflow.contracts import ModelVersion, without_credentials
from compileflow.steps.register import find_version, register_version
from compileflow.steps.request import CompileRequest
from compileflow.steps.values import CompiledArtifact, FetchedSource, ValidatedArtifact
from tasks.policies import RETRIES
from tasks.settings import settings_for


@task(name="register", description="Register the proven artifact in one registry.", **RETRIES)
def register(
    source: FetchedSource,
    artifact: CompiledArtifact,
    validated: ValidatedArtifact,
    request: CompileRequest,
    registry_uri: str,
) -> ModelVersion:
    """Return the version, new or found."""
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
    get_run_logger().info(
        "registered in %s as %s version %d", without_credentials(registry_uri), version.name, version.version
    )
    return version


@task(name="look up version", description="The register step is off: find what is there.", **RETRIES)
def look_up(
    source: FetchedSource, artifact: CompiledArtifact, request: CompileRequest, registry_uri: str
) -> ModelVersion | None:
    """Return the version that holds the artifact already, or None."""
    version = find_version(
        source, artifact, name=request.name, registry_uri=registry_uri, settings=settings_for(request)
    )
    get_run_logger().info(
        "the register step is off; the registry %s has %s of this artifact", without_credentials(registry_uri),
        f"{version.name} version {version.version}" if version else "no version",
    )  # fmt: skip
    return version
