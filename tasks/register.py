"""register: make the proven artifact a version in the model registry."""

from __future__ import annotations

from prefect import get_run_logger, task
from prefect.runtime import flow_run

from compileflow.settings import get_settings
from compileflow.steps.register import find_version, register_version
from compileflow.steps.request import CompileRequest
from compileflow.steps.values import CompiledArtifact, FetchedSource, ValidatedArtifact
from compileflow.versions import ModelVersion
from tasks.policies import RETRIES


@task(name="register", description="Register the proven artifact.", **RETRIES)
def register(
    source: FetchedSource, artifact: CompiledArtifact, validated: ValidatedArtifact, request: CompileRequest
) -> ModelVersion:
    """Return the version, new or found."""
    settings = get_settings()
    version = register_version(
        source,
        artifact,
        validated,
        name=request.name,
        allow_warn=request.allow_warn,
        store_uri=settings.resolved_store_uri(request.store_uri),
        registry_uri=settings.resolved_registry_uri(request.registry_uri),
        flow_run_id=flow_run.id,
    )
    get_run_logger().info("registered as %s version %d", version.name, version.version)
    return version


@task(name="look up version", description="The register step is off: find what is there.", **RETRIES)
def look_up(source: FetchedSource, artifact: CompiledArtifact, request: CompileRequest) -> ModelVersion | None:
    """Return the version that holds the artifact already, or None."""
    registry_uri = get_settings().resolved_registry_uri(request.registry_uri)
    version = find_version(source, artifact, name=request.name, registry_uri=registry_uri)
    get_run_logger().info(
        "the register step is off; the registry %s has %s of this artifact", registry_uri,
        f"{version.name} version {version.version}" if version else "no version",
    )  # fmt: skip
    return version
