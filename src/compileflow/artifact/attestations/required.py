"""`require_signature=`: which keys it trusts, and the refusal of an artifact that none of them signed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from compileflow._process.folders import work_folder
from compileflow.artifact.attestations.envelopes import Envelope, read_bundle, stored_envelopes, write_bundle
from compileflow.artifact.attestations.keys import configured_keys, load_public_keys
from compileflow.artifact.attestations.verify import Attested, verify_attestations
from compileflow.artifact.integrity import CheckedFolder
from compileflow.artifact.manifest import ATTESTATIONS_NAME
from compileflow.catalog import open_store
from compileflow.errors import SignatureError, StoreError
from compileflow.settings import Settings, get_settings

if TYPE_CHECKING:
    from securesystemslib.signer import SSlibKey

# True: keys as configured. Public keys' PEM files: these, and no other. None: what the settings say.
RequireSignature = bool | str | Path | Sequence[str | Path] | None


def requires_signature(asked: RequireSignature, settings: Settings | None = None) -> bool:
    """Say whether anything has to be signed; settings None: as configured."""
    return (settings or get_settings()).require_signature if asked is None else asked is not False


def required_keys(asked: RequireSignature, settings: Settings) -> tuple[SSlibKey, ...] | None:
    """Return the keys of which one must have signed each statement; None where nothing needs a signature.

    Raises:
        SpecError: a signature is required, and there is no key, or one cannot be read.
        SignatureError: securesystemslib is missing.
    """
    if not requires_signature(asked, settings):
        return None
    if asked is None or isinstance(asked, bool):
        return load_public_keys(configured_keys(settings))
    return load_public_keys([asked] if isinstance(asked, str | Path) else asked)


def check_signed(
    folder: Path,
    checked: CheckedFolder,
    keys: Sequence[SSlibKey],
    *,
    store_uri: str | None,
    settings: Settings,
) -> Attested:
    """Refuse an artifact without a signed provenance and a signed verdict that lets it pass.

    What lies beside the files is looked at first, so that what was fetched once loads without its store. A verdict
    or a signature may be newer than the fetch: what does not do is asked of the store again.

    Args:
        folder: Of the artifact.
        checked: What was found in it; nothing was opened yet.
        keys: One of them must have signed each statement.
        store_uri: Where the folder was fetched from, if it was.
        settings: Where unfinished work goes.

    Raises:
        SignatureError: see `verify_attestations`.
    """

    def check(envelopes: Sequence[Envelope]) -> Attested:
        return verify_attestations(
            checked.digest,
            envelopes,
            trusted_keys=keys,
            require_signature=True,
            manifest_source=checked.manifest.source.digest,
        )

    try:
        return check(read_bundle(folder))
    except SignatureError:
        if store_uri is None:
            raise
    envelopes = stored_envelopes(open_store(store_uri, settings), checked.digest)
    attested = check(envelopes)
    # The answer stands without the copy, and somebody else may own the cache.
    with suppress(OSError, StoreError), work_folder(settings.work_dir, label="attestations") as work:
        write_bundle(work, envelopes)
        (work / ATTESTATIONS_NAME).replace(folder / ATTESTATIONS_NAME)
    return attested
