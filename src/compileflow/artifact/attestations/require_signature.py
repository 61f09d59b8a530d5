"""The parameter `require_signature=` of every load: which keys it trusts, and the check that it makes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from compileflow._process.folders import file_written_whole, work_folder
from compileflow.artifact.attestations.envelopes import (
    RECORDS,
    Envelope,
    read_bundle,
    statement_in,
    stored_envelopes,
    write_bundle,
)
from compileflow.artifact.attestations.keys import configured_keys, load_public_keys
from compileflow.artifact.attestations.verify import Attestations, check_subject, verify_attestations
from compileflow.artifact.integrity import CheckedFolder
from compileflow.artifact.manifest import ATTESTATIONS_NAME
from compileflow.catalog import open_store
from compileflow.errors import SignatureError, StoreError
from compileflow.settings import Settings, get_settings

if TYPE_CHECKING:
    from securesystemslib.signer import SSlibKey

logger = logging.getLogger(__name__)
# True: trust the configured keys. PEM files of public keys: trust only these. None: follow the settings.
RequireSignature = bool | str | Path | Sequence[str | Path] | None


def requires_signature(requirement: RequireSignature, settings: Settings | None = None) -> bool:
    """Say whether a load needs signatures; settings None means the configured ones."""
    return (settings or get_settings()).require_signature if requirement is None else requirement is not False


def required_keys(requirement: RequireSignature, settings: Settings) -> tuple[SSlibKey, ...] | None:
    """Return the keys of which one must have signed each statement; None if no signature is required.

    Raises:
        SpecError: A signature is required, but no key is trusted or a key cannot be read.
        SignatureError: securesystemslib is not installed.
    """
    if not requires_signature(requirement, settings):
        return None
    if requirement is None or isinstance(requirement, bool):
        return load_public_keys(configured_keys(settings))
    return load_public_keys([requirement] if isinstance(requirement, str | Path) else requirement)


def check_signed(
    folder: Path,
    checked_folder: CheckedFolder,
    keys: Sequence[SSlibKey],
    *,
    store_uri: str | None,
    settings: Settings,
) -> Attestations:
    """Refuse an artifact that lacks a signed provenance or a signed verdict PASSED or WARNED.

    The bundle beside the files is verified first, so that a fetched artifact loads without its store. A verdict or
    a signature may be newer than the fetch: if the bundle fails the check, the envelopes of the store are checked.

    Args:
        folder: Folder of the artifact.
        checked_folder: Result of `check_folder`.
        keys: Trusted public keys. One of them must have signed each statement.
        store_uri: URI of the store that the folder was fetched from; None if it was not fetched.
        settings: Settings that name the work folder and how to reach the store.

    Raises:
        SignatureError: See `verify_attestations`.
    """

    def check(envelopes: Sequence[Envelope]) -> Attestations:
        return verify_attestations(
            checked_folder.digest,
            envelopes,
            trusted_keys=keys,
            require_signature=True,
            manifest_source=checked_folder.manifest.source.digest,
        )

    try:
        return check(read_bundle(folder))
    except SignatureError:
        if store_uri is None:
            raise
    envelopes = stored_envelopes(open_store(store_uri, settings), checked_folder.digest)
    attestations = check(envelopes)
    # The check has passed without this copy, and another user may own the cache.
    with (
        suppress(OSError, StoreError),
        work_folder(settings.work_dir, label="attestations") as work,
        file_written_whole(folder / ATTESTATIONS_NAME, partial=work / ATTESTATIONS_NAME),
    ):
        write_bundle(work, envelopes)
    return attestations


def check_subjects(folder: Path, digest: str, *, is_trusted: bool) -> None:
    """Refuse an artifact whose bundle is about another artifact: its manifest was edited after the verdict.

    No signature is required, so that a missing bundle is accepted, and a damaged one with a warning in the log.

    Args:
        folder: Folder of the artifact.
        digest: Digest of the artifact, as computed from its files.
        is_trusted: Accept statements about another artifact, because the files may differ from the manifest.

    Raises:
        SignatureError: A statement names another artifact, and `is_trusted` is false.
    """
    try:
        statements = [statement_in(envelope) for envelope in read_bundle(folder)]
    except SignatureError as error:
        logger.warning("Loading %s although its attestations are damaged: %s", folder, error)
        return
    for statement in statements:
        kind = RECORDS.get(str((statement or {}).get("predicateType")))
        if statement is not None and kind is not None and not is_trusted:
            check_subject(kind, statement, digest)
