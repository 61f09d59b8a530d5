"""Collect a store's garbage: what no registered version refers to, wherever it is registered."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

from compileflow.artifact.attestations.envelopes import statement_in, stored_envelopes
from compileflow.artifact.attestations.statements import report_digest
from compileflow.catalog import open_registry, open_store
from compileflow.contracts import ArtifactStore, Collected, without_credentials
from compileflow.errors import RegistryError, SignatureError, SpecError
from compileflow.settings import Settings

_DAY_S = 86400.0
_FILES = ("sqlite:///", "mlflow:sqlite:///")


def collect_garbage(
    store_uri: str,
    registry_uris: Sequence[str],
    *,
    settings: Settings,
    min_age_s: float = _DAY_S,
    dry_run: bool = False,
) -> Collected:
    """Delete folders that no version names as its artifact, report or source, and what only they needed.

    The last report on a registered artifact stays, too: its verdict, which may be signed, stands on it.

    Args:
        store_uri: The store.
        registry_uris: All registries whose versions are in it. A registry that is left out loses its artifacts.
        settings: Where everything is, and the credentials.
        min_age_s: Seconds for which what was put stays, whoever needs it; under a day, nobody may be writing.
        dry_run: Only count.

    Raises:
        SpecError: no registry is named.
        RegistryError: a registry is not there, or there is no version at all, which looks like the wrong registry;
            RegistryUnavailableError when one did not answer. Nothing was deleted.
        IntegrityError: a listing cannot be read; nothing was deleted.
        StoreError: the store refused; StoreUnavailableError when it did not answer.
    """
    if not registry_uris:
        raise SpecError("No registry says what has to stay.", hint="Name all that have versions in this store.")
    keep: set[str] = set()
    for uri in registry_uris:
        keep |= _needed(uri, settings)
    if not keep:
        names = ", ".join(map(without_credentials, registry_uris))
        raise RegistryError(
            f"There is no version in {names}: all of {store_uri} would be garbage.",
            hint="Check the registry's URI. A store that nobody needs is deleted as a whole, without this.",
        )
    store = open_store(store_uri, settings)
    keep |= reports_on(store, keep)
    return store.gc(keep, min_age_s=min_age_s, dry_run=dry_run)


def _needed(registry_uri: str, settings: Settings) -> set[str]:
    # A mistyped path would otherwise be an empty registry, and cost everything.
    for prefix in _FILES:
        if registry_uri.startswith(prefix) and not Path(registry_uri.removeprefix(prefix)).exists():
            raise RegistryError(f"There is no registry {registry_uri}.", hint="Check its path.")
    return {
        digest
        for version in open_registry(registry_uri, settings).versions()
        for digest in (version.artifact_digest, version.report_digest, version.source_digest)
    }


def reports_on(store: ArtifactStore, digests: Collection[str]) -> set[str]:
    """Return the reports that the store's records name for these artifacts; some are younger than the versions."""
    found: set[object] = set()
    for digest in {key for kind in ("report-of", "verdict") for key in store.list_records(kind)} & set(digests):
        found.add((store.get_record("report-of", digest) or {}).get("report_digest"))
        for envelope in stored_envelopes(store, digest):
            # What is no statement keeps nothing, and is told by whoever verifies it.
            with suppress(SignatureError):
                found.add(report_digest(statement_in(envelope) or {}))
    return {digest for digest in found if isinstance(digest, str)}
