"""What is said of an artifact, wherever it is, and all that can be verified about it in one answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compileflow.artifact.attestations.envelopes import Envelope, read_bundle, stored_envelopes
from compileflow.artifact.attestations.keys import configured_keys, load_public_keys
from compileflow.artifact.attestations.statements import report_digest
from compileflow.artifact.attestations.verify import Attested, check_report, verify_attestations
from compileflow.artifact.integrity import artifact_files
from compileflow.artifact.manifest import ArtifactManifest, read_manifest, verify_folder
from compileflow.artifact.open import cached_folder
from compileflow.catalog import open_store
from compileflow.contracts.digests import folder_digest
from compileflow.errors import IntegrityError, SignatureError, StoreUnavailableError
from compileflow.settings import Settings, get_settings
from compileflow.stores.layout import split_uri


@dataclass(frozen=True)
class Verification:
    """What was found of an artifact.

    Attributes:
        digest: The artifact's: that of the URI, or of what is in the folder.
        files: How many its manifest lists, and itself; 0 where the store gave none.
        intact: Whether every byte is the one that the manifest lists.
        attested: Whether provenance and verdict are there, are on this artifact, and agree with it.
        signed_by: Ids of the trusted keys that signed one of them or both.
        verdict: PASSED, WARNED or FAILED as attested; None where no verdict is.
        report_intact: Whether the report is the one that the verdict stands on; None where it was not looked at.
        problems: What was found altered, or missing and required, a line each. () is a pass.
    """

    digest: str
    files: int
    intact: bool
    attested: bool
    signed_by: tuple[str, ...]
    verdict: str | None
    report_intact: bool | None
    problems: tuple[str, ...]


def attestations_of(location: str | Path, *, settings: Settings | None = None) -> tuple[Envelope, ...]:
    """Return the envelopes with an artifact's statements, unchecked: provenance, verdict, or one of them, or ().

    Those of a URI are the store's. Where it has none or does not answer, those that were fetched with the files.

    Raises:
        SignatureError: a file of them cannot be read.
        StoreError: the store refused, or did not answer and nothing was fetched before.
    """
    text = str(location)
    if "://" not in text:
        return read_bundle(Path(location).expanduser())
    settings = settings or get_settings()
    store_uri, digest = split_uri(text)
    fetched = cached_folder(digest, settings)
    try:
        found = stored_envelopes(open_store(store_uri, settings), digest)
    except StoreUnavailableError:
        if not fetched.exists():
            raise
        found = ()
    return found or read_bundle(fetched)


def verify_artifact(
    location: str | Path,
    *,
    settings: Settings,
    keys: Sequence[str | Path] = (),
    require_signature: bool | None = None,
    report: Path | None = None,
) -> Verification:
    """Verify all that there is: files, statements, signatures, report. Opens no compiled file.

    Args:
        location: Folder, or STORE/manifests/sha256/DIGEST.json.
        settings: Where the cache is, and which keys are trusted.
        keys: Public keys to trust instead.
        require_signature: Whether a missing statement or signature is a problem. None: as the settings say.
        report: Folder of the report. None: the store's, where `location` is a URI.

    Raises:
        ManifestError: there is no artifact there.
        SpecError: a key cannot be used, or a signature is required and no key is trusted.
        StoreUnavailableError: the store did not answer.
    """
    required = settings.require_signature if require_signature is None else require_signature
    paths = keys or configured_keys(settings)
    trusted = load_public_keys(paths) if paths or required else ()
    problems: list[str] = []
    digest, manifest = _check_files(str(location), settings, problems)
    intact = not problems
    attested = Attested(None, None)
    try:
        envelopes = attestations_of(location, settings=settings)
        # Twice, so that what is missing does not hide what is there.
        for demanded in (False, True) if required else (False,):
            attested = verify_attestations(
                digest,
                envelopes,
                trusted_keys=trusted,
                require_signature=demanded,
                manifest_source=manifest.source.digest if manifest else None,
            )
    except SignatureError as error:
        problems.append(str(error))
    return Verification(
        digest=digest,
        files=len(manifest.files) + 1 if manifest else 0,
        intact=intact,
        attested=attested.complete,
        signed_by=attested.signed_by,
        verdict=attested.result,
        report_intact=_check_report(str(location), attested, report, settings, problems),
        problems=tuple(problems),
    )


def _check_files(location: str, settings: Settings, problems: list[str]) -> tuple[str, ArtifactManifest | None]:
    """Return the digest, and the manifest where there is one to be read; what is altered goes to `problems`."""
    if "://" in location:
        store_uri, digest = split_uri(location)
        try:
            with open_store(store_uri, settings).open_folder(digest) as folder:
                return digest, verify_folder(folder)[0]
        except IntegrityError as error:
            problems.append(str(error))
            return digest, None
    folder = Path(location).expanduser().absolute()
    try:
        manifest, files = verify_folder(folder)
    except IntegrityError as error:
        problems.append(str(error))
        manifest, files = read_manifest(folder), artifact_files(folder)
    return folder_digest(files), manifest


def _check_report(
    location: str, attested: Attested, report: Path | None, settings: Settings, problems: list[str]
) -> bool | None:
    verdict = attested.verdict
    digest = report_digest(verdict.statement) if verdict is not None else None
    if verdict is None or digest is None or (report is None and "://" not in location):
        return None
    try:
        if report is not None:
            check_report(report, verdict.statement)
        else:
            # The store compares every byte with the digest that the verdict names.
            with open_store(split_uri(location)[0], settings).open_folder(digest):
                pass
    except IntegrityError as error:
        problems.append(f"The report: {error}")
        return False
    return True
