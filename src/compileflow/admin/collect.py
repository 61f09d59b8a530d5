"""Collect the garbage of a store: folders that no version in any of its registries refers to."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

from compileflow._process.folders import sweep
from compileflow.artifact.attestations.envelopes import statement_in, stored_envelopes
from compileflow.artifact.attestations.statements import report_digest
from compileflow.catalog import open_registry, open_store
from compileflow.contracts import ArtifactStore, Collected, ModelVersion, without_credentials
from compileflow.errors import EmptyRegistryError, RegistryError, SignatureError, SpecError
from compileflow.settings import Settings
from compileflow.steps.validate import WAITING, report_on

_DAY_S = 86400.0
_FILE_SCHEMES = ("sqlite:///", "mlflow:sqlite:///")


def collect_garbage(
    store_uri: str,
    registry_uris: Sequence[str],
    *,
    settings: Settings,
    min_age_s: float = _DAY_S,
    dry_run: bool = False,
    keep: Collection[str] = (),
    lost: Collection[str] = (),
    at_most: float = 1.0,
) -> Collected:
    """Delete the folders that no version names as its artifact, report or source, and their blobs.

    The last report on a registered artifact is also kept, because the verdict, which may be signed, is based on
    it. So is an artifact that waits for its device, with the recorded answers of its source model.

    Args:
        store_uri: URI of the store.
        registry_uris: All registries with versions in this store. Artifacts of omitted registries are deleted.
        settings: Settings with the credentials.
        min_age_s: Objects that were put less than this number of seconds ago are kept. Below a day, no other
            process may write to the store.
        dry_run: Count, but do not delete.
        keep: Digests of further folders to keep.
        lost: Digests of folders that are known to be missing.
        at_most: Fraction of the store's bytes that may be deleted. A dry run ignores it.

    Raises:
        SpecError: No registry is given.
        RegistryError: A registry does not exist. Nothing was deleted.
        EmptyRegistryError: The registries have no version at all, which suggests a wrong URI. Nothing was deleted.
        RegistryUnavailableError: A registry did not answer. Nothing was deleted.
        IntegrityError: A listing cannot be read. Nothing was deleted.
        StoreError: The store refused. Or nothing was deleted, because the store does not list a folder of `keep`
            or one that a version names by its URI in this store, or because more than `at_most` would be deleted.
        StoreUnavailableError: The store did not answer.
    """
    if not registry_uris:
        raise SpecError(
            "No registry is given, so every folder would be garbage.",
            hint="Name all registries that have versions in this store.",
        )
    if not dry_run:
        # Killed runs leave work folders.
        sweep(settings.work_dir)
    versions = [version for uri in registry_uris for version in _versions(uri, settings)]
    if not versions:
        names = ", ".join(map(without_credentials, registry_uris))
        raise EmptyRegistryError(
            f"{names} has no version, so everything in {store_uri} would be garbage.",
            hint="Check the registry's URI. To delete a whole store, delete its folder or prefix.",
        )
    store = open_store(store_uri, settings)
    digests_in_use = {
        digest
        for version in versions
        for digest in (version.artifact_digest, version.report_digest, version.source_digest)
    }
    digests_in_use |= reports_on(store, digests_in_use) | _waiting(store)
    # A registry may also name folders of other stores.
    uris_in_use = {uri for version in versions for uri in (version.artifact_uri, version.report_uri)}
    required_digests = {digest for digest in digests_in_use if store.folder_uri(digest) in uris_in_use} | {*keep}
    digests_to_keep = digests_in_use | required_digests
    return store.gc(
        digests_to_keep,
        min_age_s=min_age_s,
        dry_run=dry_run,
        may_lack=(digests_to_keep - required_digests) | {*lost},
        at_most=at_most,
    )


def _waiting(store: ArtifactStore) -> set[str]:
    """Return the digests of the artifacts that wait for their device, and of their recorded references."""
    waiting = {digest: report_on(store, digest, kind=WAITING) for digest in store.list_records(WAITING)}
    return {
        needed
        for digest, pending in waiting.items()
        if pending is not None
        for needed in (digest, pending.report_digest)
    }


def check_registry_exists(registry_uri: str, settings: Settings) -> None:
    """Refuse the mistyped path of a registry: an absent file looks like a registry without versions.

    Raises:
        RegistryError: The file does not exist. The embedded registry may be absent: its first version creates it.
    """
    is_embedded = settings.registry_uri is None and (registry_uri,) == settings.resolved_registry_uris()
    for prefix in _FILE_SCHEMES:
        is_absent = registry_uri.startswith(prefix) and not Path(registry_uri.removeprefix(prefix)).exists()
        if is_absent and not is_embedded:
            raise RegistryError(f"The registry {registry_uri} does not exist.", hint="Check its path.")


def _versions(registry_uri: str, settings: Settings) -> Sequence[ModelVersion]:
    # Without the check, the collection would delete everything.
    check_registry_exists(registry_uri, settings)
    return open_registry(registry_uri, settings).versions()


def reports_on(store: ArtifactStore, digests: Collection[str]) -> set[str]:
    """Return the digests of the reports on artifacts, from the store's records. Some are newer than a version."""
    reports: list[object] = []
    kinds = ("report-of", WAITING, "verdict")
    for digest in {key for kind in kinds for key in store.list_records(kind)} & set(digests):
        reports += [(store.get_record(kind, digest) or {}).get("report_digest") for kind in kinds[:2]]
        for envelope in stored_envelopes(store, digest):
            # An invalid statement names no report. `compileflow verify` reports it.
            with suppress(SignatureError):
                reports.append(report_digest(statement_in(envelope) or {}))
    return {digest for digest in reports if isinstance(digest, str)}
