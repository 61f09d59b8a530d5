"""Watch registries: which source versions have no compiled version, and which of them have to be announced."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from pydantic import Field

from compileflow._process.packages import installed_versions
from compileflow.admin.shared_compile import SharedCompile
from compileflow.catalog import get_source, open_registry
from compileflow.contracts import ListingSource, SourceVersion
from compileflow.contracts.digests import json_digest
from compileflow.errors import SpecError
from compileflow.settings import Settings
from compileflow.steps.cells import Cells
from compileflow.steps.request import CompileRequest

CONFIGURED = "registry:"
AnnouncementStep = Literal["announce", "announce again", "wait", "give up"]


class WatchRequest(Cells):
    """Registries to watch, and the targets and precisions that each source version is compiled for."""

    places: tuple[str, ...] = Field(
        (),
        title="Registries",
        description="URIs of registries with source versions: neptune://workspace/project, mlflow:TRACKING; or "
        "registry: for the source models of the configured registry. Empty: the configured registries.",
        json_schema_extra={"position": 4},
    )
    names: tuple[str, ...] = Field(
        (),
        title="Names",
        description="Names of the models to watch. Empty: all.",
        json_schema_extra={"position": 5},
    )
    retry_failed: bool = Field(
        False,
        title="Retry what failed",
        description="Compile again what this version of compileflow could not compile before.",
        json_schema_extra={"position": 6},
    )
    announce_again_s: int = Field(
        3600,
        ge=1,
        title="Announce again after seconds",
        description="A compile that is still missing this long after its announcement, and that no run is working "
        "on, is announced again.",
        json_schema_extra={"position": 7},
    )
    most_announcements: int = Field(
        3,
        ge=1,
        title="Most announcements",
        description="A compile that is still missing after this number of announcements counts as failed.",
        json_schema_extra={"position": 8},
    )


@dataclass(frozen=True)
class MissingCompile:
    """A source version without a compiled version for one target and precision."""

    source: SourceVersion
    request: CompileRequest

    @property
    def key(self) -> str:
        """What identifies the compile for all watchers with this version of compileflow: 64 hex digits."""
        fields = self.request.model_dump(mode="json")
        return json_digest([self.source.uri, self.source.digest, fields, installed_versions(["compileflow"])])

    def shared(self, settings: Settings) -> SharedCompile:
        """Return what all watchers and runs know of the compile."""
        return SharedCompile.of(self.request, self.key, settings)


def missing_compiles(watch: WatchRequest, settings: Settings) -> list[MissingCompile]:
    """Return what has to be compiled, the oldest source version first.

    Raises:
        SpecError: A URI does not name a registry that lists source versions.
        RegistryError: The registry of compiled versions failed.
        SourceError: A registry of source versions failed.
    """
    sources = [
        source
        for place in watch.places or configured_places(settings)
        for source in source_versions(place, settings)
        if not watch.names or source.name in watch.names
    ]
    sources.sort(key=lambda source: source.created_at)
    compiles = [
        MissingCompile(source, request)
        for source in sources
        for request in Cells.model_validate(
            watch.model_dump(include=set(Cells.model_fields)) | {"shared": {"name": source.name, **watch.shared}}
        ).requests_for(source.model)
    ]
    return [missing for missing in compiles if is_missing(missing, watch, settings)]


def configured_places(settings: Settings) -> tuple[str, ...]:
    """Return the configured registries that list source versions, else the configured one."""
    uris = settings.resolved_registry_uris()
    listing = tuple(uri for uri in uris if uri.partition(":")[0] in ("neptune", "mlflow"))
    return listing or (CONFIGURED,)


def source_versions(place: str, settings: Settings) -> list[SourceVersion]:
    """Return the source versions of a registry.

    Args:
        place: URI of a registry, or `registry:` for the source models of the configured one.
        settings: Tokens, timeouts and the configured registry.

    Raises:
        SpecError: The URI does not name such a registry.
    """
    if place == CONFIGURED:
        return _recorded_sources(settings)
    source = get_source(place.partition(":")[0], settings)
    if not isinstance(source, ListingSource):
        raise SpecError(
            f"{place} does not list source versions.",
            hint=f"Give neptune://workspace/project, mlflow:TRACKING, or {CONFIGURED}",
        )
    return list(source.versions(place))


def _recorded_sources(settings: Settings) -> list[SourceVersion]:
    """Return each source model of the configured registry once, as of the first version compiled from it."""
    versions = sorted(
        open_registry(settings.resolved_registry_uri(), settings).versions(),
        key=lambda version: (version.created_at, version.version),
    )
    sources: dict[tuple[str, str], SourceVersion] = {}
    for version in versions:
        source = SourceVersion(
            model=f"{CONFIGURED}{version.name}@{version.version}",
            uri=version.source_uri,
            name=version.name,
            created_at=version.created_at,
            digest=version.source_digest,
        )
        sources.setdefault((version.name, version.source_digest), source)
    return list(sources.values())


def is_missing(missing: MissingCompile, watch: WatchRequest, settings: Settings) -> bool:
    """Return whether the registry lacks the compiled version, and no earlier attempt failed for good."""
    request, source = missing.request, missing.source
    registry = open_registry(settings.resolved_registry_uris(request.registry_uris)[0], settings)
    for version in registry.compiled_from(source.uri):
        is_same_model = source.digest in ("", version.source_digest)
        precision = version.spec.get("precision")
        if is_same_model and (version.target, precision) == (request.target, request.precision.value):
            return False
    return watch.retry_failed or missing.shared(settings).failed_at() is None


def next_announcement(shared: SharedCompile, watch: WatchRequest) -> tuple[AnnouncementStep, int]:
    """Return what to do about a missing compile, and the number that its next announcement has.

    A compile that was announced is left to the run that the event started. That run may have been lost, cancelled
    or ended by an error that may go away; then the compile is announced again, a limited number of times.
    """
    last, failed_at = shared.announcement(), shared.failed_at()
    if last is None or (failed_at is not None and failed_at >= last.at):
        # What failed for good is missing only for a watch that retries it.
        return "announce", 1
    is_recent = datetime.now(UTC) - last.at < timedelta(seconds=watch.announce_again_s)
    if is_recent or shared.is_running():
        return "wait", last.count
    if last.compiled:
        # The compiled version was deleted from the registry.
        return "announce", 1
    if last.count >= watch.most_announcements:
        return "give up", last.count
    return "announce again", last.count + 1
