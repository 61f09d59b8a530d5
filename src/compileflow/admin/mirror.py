"""Copy an artifact store into another: folders, and what is recorded about artifacts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from pydantic import JsonValue

from compileflow.admin.collect import reports_on
from compileflow.catalog import open_store
from compileflow.contracts import ArtifactStore
from compileflow.errors import IntegrityError, SpecError
from compileflow.settings import Settings

# Records by an artifact's digest. Cache records stay: they say what one store's users have made.
_KINDS = ("report-of", "provenance", "verdict")


def mirror_store(
    from_uri: str,
    to_uri: str,
    *,
    settings: Settings,
    digests: Collection[str] | None = None,
    on_progress: Callable[[str], None] = lambda line: None,
) -> int:
    """Copy folders and the records on them; what is there already is not sent again.

    Every byte is checked against its SHA-256 when it is read, and again while it is written.

    Args:
        from_uri: Store to copy from.
        to_uri: Store to copy to.
        settings: Where both are, and the credentials.
        digests: Only these folders, and the reports on them. None: all.
        on_progress: Told in one line what is copied.

    Returns:
        How many of the folders `to_uri` has now: all that were asked for.

    Raises:
        SpecError: both are the same store, or there is nothing in the first, which looks like the wrong one.
        IntegrityError: a folder is absent or altered.
        StoreError: one of the stores refused; StoreUnavailableError when it did not answer.
    """
    source, mirror = open_store(from_uri, settings), open_store(to_uri, settings)
    if source.uri == mirror.uri:
        raise SpecError(f"{from_uri} cannot be copied into itself.", hint="Name another store.")
    wanted = list(source.list()) if digests is None else _with_reports(source, digests)
    if not wanted:
        raise SpecError(f"{from_uri} holds no folder that could be copied.", hint="Check the URI of that store.")
    for number, digest in enumerate(wanted, start=1):
        if mirror.exists(digest):
            continue
        on_progress(f"folder {number} of {len(wanted)}: {digest[:12]}")
        with source.open_folder(digest) as folder:
            stored = mirror.put_folder(folder)
        if stored.digest != digest:
            raise IntegrityError(
                f"{mirror.uri} took {digest[:12]}... as {stored.digest[:12]}...", hint="Do not use that store."
            )
    for kind in _KINDS:
        recorded = source.list_records(kind)
        for digest in [key for key in recorded if digests is None or key in wanted]:
            _copy_record(source, mirror, kind, digest)
    return len(wanted)


def _with_reports(source: ArtifactStore, digests: Collection[str]) -> list[str]:
    """Add the reports that the records point at: a mirror whose records point nowhere is none."""
    return list(dict.fromkeys([*digests, *sorted(reports_on(source, digests))]))


def _copy_record(source: ArtifactStore, mirror: ArtifactStore, kind: str, digest: str) -> None:
    value = source.get_record(kind, digest)
    if value is None:
        return
    moved = {name: _moved(part, source, mirror) for name, part in value.items()}
    there = mirror.get_record(kind, digest)
    if there == moved or (_signed(there) and not _signed(moved)):
        return
    mirror.put_record(kind, digest, moved)


def _moved(value: JsonValue, source: ArtifactStore, mirror: ArtifactStore) -> JsonValue:
    """Return a record's value with the addresses of the store it is in from now on."""
    if isinstance(value, str) and value.startswith(f"{source.uri}/"):
        return mirror.uri + value.removeprefix(source.uri)
    return value


def _signed(record: Mapping[str, JsonValue] | None) -> bool:
    """Say whether it is a signed statement. One that is not never takes the place of one that is."""
    return bool(record and record.get("signatures"))
