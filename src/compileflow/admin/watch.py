"""Watch registries: which source versions have no compiled version, and who compiles one of them.

Several watchers may run at once. Each missing compile has a lock in the artifact store and a record of its last
attempt, so that one watcher compiles it and no watcher repeats what failed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from pydantic import Field

from compileflow._process.packages import installed_versions
from compileflow.catalog import get_source, open_registry, open_store
from compileflow.contracts import ArtifactStore, ListingSource, SourceVersion
from compileflow.contracts.digests import json_digest
from compileflow.errors import CompileflowError, SpecError
from compileflow.settings import Settings
from compileflow.steps.cells import Cells
from compileflow.steps.request import CompileRequest

CONFIGURED = "registry:"
_ATTEMPT, _ANNOUNCED = "watch-attempt", "watch-announced"


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
    return watch.retry_failed or _store(missing, settings).get_record(_ATTEMPT, missing.key) is None


@contextmanager
def claimed(missing: MissingCompile, watch: WatchRequest, settings: Settings) -> Iterator[bool]:
    """Hold a compile for the duration of the block, so that no other watcher starts it.

    Yields:
        False if another watcher holds it, or finished it meanwhile. A watcher that dies releases what it holds.
    """

    class TakenError(Exception):
        pass

    def refuse() -> None:
        raise TakenError

    try:
        lock = _store(missing, settings).lock(f"watch/{missing.key}", on_wait=refuse)
        lock.__enter__()
    except TakenError:
        yield False
        return
    try:
        yield is_missing(missing, watch, settings)
    finally:
        lock.__exit__(None, None, None)


def is_new(missing: MissingCompile, settings: Settings) -> bool:
    """Return whether no watcher has announced the compile."""
    return _store(missing, settings).get_record(_ANNOUNCED, missing.key) is None


def record_announcement(missing: MissingCompile, settings: Settings) -> None:
    """Record that the compile was announced."""
    _store(missing, settings).put_record(_ANNOUNCED, missing.key, {"at": _now()})


def record_failure(missing: MissingCompile, error: CompileflowError, settings: Settings) -> None:
    """Record an attempt that would fail again; one that may succeed later leaves no record."""
    if not error.retryable:
        value = {"at": _now(), "error": error.message, "report_uri": error.report_uri}
        _store(missing, settings).put_record(_ATTEMPT, missing.key, dict(value))


def _store(missing: MissingCompile, settings: Settings) -> ArtifactStore:
    return open_store(settings.resolved_store_uri(missing.request.store_uri), settings)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
