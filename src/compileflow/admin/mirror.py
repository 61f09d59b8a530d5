"""Mirror an artifact store: copy its folders and the records about its artifacts to another store."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from pydantic import JsonValue

from compileflow.admin.collect import reports_on
from compileflow.catalog import open_store
from compileflow.contracts import ArtifactStore
from compileflow.errors import IntegrityError, SpecError
from compileflow.settings import Settings
from compileflow.steps.attest import WAITING_VERDICT
from compileflow.steps.validate import WAITING

# Kinds of records about an artifact. Cache records are not copied, because they belong to the runs of one store.
_KINDS = ("report-of", WAITING, WAITING_VERDICT, "provenance", "verdict")


def mirror_store(
    from_uri: str,
    to_uri: str,
    *,
    settings: Settings,
    digests: Collection[str] | None = None,
    check: bool = False,
    on_progress: Callable[[str], None] = lambda line: None,
) -> int:
    """Copy folders and the records about them. Existing folders are not sent again.

    Every byte is checked against its SHA-256 when it is read, and again when it is written.

    Args:
        from_uri: URI of the store to copy from.
        to_uri: URI of the store to copy to.
        settings: Settings with the credentials.
        digests: Digests of the folders to copy, with the reports on them. None: all folders.
        check: Also read the folders that exist in the second store, and replace altered files.
        on_progress: Called with one line per folder.

    Returns:
        The number of folders that were copied or existed already.

    Raises:
        SpecError: Both URIs name the same store, or the first store is empty, which suggests a wrong URI.
        IntegrityError: A folder is missing or altered.
        StoreError: One of the stores refused.
        StoreUnavailableError: One of the stores did not answer.
    """
    source, mirror = open_store(from_uri, settings), open_store(to_uri, settings)
    if source.uri == mirror.uri:
        raise SpecError(f"{from_uri} cannot be copied into itself.", hint="Name another store.")
    folders = list(source.list()) if digests is None else _with_reports(source, digests)
    if not folders:
        raise SpecError(f"{from_uri} does not hold any folder to copy.", hint="Check the URI of that store.")
    for number, digest in enumerate(folders, start=1):
        if not check and mirror.exists(digest):
            continue
        on_progress(f"folder {number} of {len(folders)}: {digest[:12]}")
        with source.open_folder(digest) as folder:
            stored_folder = mirror.put_folder(folder)
        if stored_folder.digest != digest:
            raise IntegrityError(
                f"Digest mismatch in {mirror.uri}: expected {digest[:12]}..., "
                f"found {stored_folder.digest[:12]}...",
                hint="Do not use that store.",
            )
    for kind in _KINDS:
        keys = source.list_records(kind)
        for digest in [key for key in keys if digests is None or key in folders]:
            _copy_record(source, mirror, kind, digest)
    return len(folders)


def _with_reports(source: ArtifactStore, digests: Collection[str]) -> list[str]:
    """Add the reports that the records point at, so that no record of the mirror points at a missing folder."""
    return list(dict.fromkeys([*digests, *sorted(reports_on(source, digests))]))


def _copy_record(source: ArtifactStore, mirror: ArtifactStore, kind: str, digest: str) -> None:
    value = source.get_record(kind, digest)
    if value is None:
        return
    copy = {name: _with_mirror_uri(part, source, mirror) for name, part in value.items()}
    existing_record = mirror.get_record(kind, digest)
    # An unsigned statement never replaces a signed one.
    if existing_record == copy or (_is_signed(existing_record) and not _is_signed(copy)):
        return
    mirror.put_record(kind, digest, copy)


def _with_mirror_uri(value: JsonValue, source: ArtifactStore, mirror: ArtifactStore) -> JsonValue:
    """Replace the URI of the source store at the start of a value by the URI of the mirror."""
    if isinstance(value, str) and value.startswith(f"{source.uri}/"):
        return mirror.uri + value.removeprefix(source.uri)
    return value


def _is_signed(record: Mapping[str, JsonValue] | None) -> bool:
    return bool(record and record.get("signatures"))
