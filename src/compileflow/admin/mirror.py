"""Mirror an artifact store: copy its folders and the records about its artifacts to another store."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping

from pydantic import JsonValue

from compileflow.admin.collect import reports_on
from compileflow.artifact.attestations.envelopes import RECORDS, Envelope, statement_in
from compileflow.artifact.attestations.replace import StatementJudge
from compileflow.artifact.attestations.statements import (
    PROVENANCE_TYPE,
    RESULT_OF,
    VERDICT_TYPE,
    report_digest,
    result,
)
from compileflow.catalog import open_store
from compileflow.contracts import ArtifactStore
from compileflow.errors import IntegrityError, SignatureError, SpecError
from compileflow.settings import Settings
from compileflow.steps.attest import WAITING_VERDICT
from compileflow.steps.validate import WAITING

logger = logging.getLogger(__name__)
# Kinds of records about an artifact. Cache records are not copied, because they belong to the runs of one store.
# After each statement comes the record that says the same.
_KINDS = (
    (PROVENANCE_TYPE, RECORDS[PROVENANCE_TYPE], ()),
    (VERDICT_TYPE, RECORDS[VERDICT_TYPE], ("report-of",)),
    (VERDICT_TYPE, WAITING_VERDICT, (WAITING,)),
)


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

    Every byte is checked against its SHA-256 when it is read, and again when it is written. A statement that the
    mirror has is replaced only as `StatementJudge` allows; otherwise it stays, which the log says.

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
        SpecError: Both URIs name the same store; or the first store is empty, which suggests a wrong URI; or a
            trusted key cannot be used.
        IntegrityError: A folder is missing or altered.
        StoreError: One of the stores refused.
        StoreUnavailableError: One of the stores did not answer.
    """
    judge = StatementJudge.of(settings)
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
    for predicate_type, statement, companions in _KINDS:
        for kind in (statement, *companions):
            for digest in [key for key in source.list_records(kind) if digests is None or key in folders]:
                copy = _copy_of(source, mirror, kind, digest)
                existing_record = mirror.get_record(kind, digest)
                if copy is None or copy == existing_record:
                    continue
                reason = ""
                if kind != statement:
                    reason = _disagreement(copy, mirror.get_record(statement, digest))
                elif existing_record is not None:
                    reason = judge.objection(digest, existing_record, copy, predicate_type=predicate_type)
                if reason:
                    logger.warning("%s keeps its %s of %s: %s", mirror.uri, kind, digest[:12], reason)
                    continue
                mirror.put_record(kind, digest, copy)
    return len(folders)


def _disagreement(record: Mapping[str, JsonValue], verdict: Envelope | None) -> str:
    """Return that the record of a verdict says something else than the mirror's statement; "" if it does not."""
    try:
        statement = statement_in(verdict) if verdict else None
    except SignatureError as error:
        return error.message.rstrip(".")
    if statement is None:
        return ""
    found = (record.get("report_digest"), str(record.get("outcome")))
    is_same = found[0] == report_digest(statement) and RESULT_OF.get(found[1]) == result(statement)
    return "" if is_same else "the other one differs from the statement there"


def _with_reports(source: ArtifactStore, digests: Collection[str]) -> list[str]:
    """Add the reports that the records point at, so that no record of the mirror points at a missing folder."""
    return list(dict.fromkeys([*digests, *sorted(reports_on(source, digests))]))


def _copy_of(source: ArtifactStore, mirror: ArtifactStore, kind: str, digest: str) -> dict[str, JsonValue] | None:
    value = source.get_record(kind, digest) or {}
    return {name: _with_mirror_uri(part, source, mirror) for name, part in value.items()} or None


def _with_mirror_uri(value: JsonValue, source: ArtifactStore, mirror: ArtifactStore) -> JsonValue:
    """Replace the URI of the source store at the start of a value by the URI of the mirror."""
    if isinstance(value, str) and value.startswith(f"{source.uri}/"):
        return mirror.uri + value.removeprefix(source.uri)
    return value
