"""Verify an artifact for `compileflow verify`: files, statements, signatures and report, in one result."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pydantic import ValidationError

from compileflow.artifact.attestations.envelopes import Envelope, read_bundle, stored_envelopes
from compileflow.artifact.attestations.keys import configured_keys, load_public_keys
from compileflow.artifact.attestations.statements import RESULTS, finished_on, report_digest
from compileflow.artifact.attestations.verify import Attestations, verify_attestations
from compileflow.artifact.manifest import ArtifactManifest, artifact_files, read_manifest, verify_folder
from compileflow.artifact.open import cached_folder, path_of
from compileflow.catalog import open_store
from compileflow.contracts import ModelVersion, without_credentials
from compileflow.contracts.digests import folder_digest
from compileflow.errors import IntegrityError, ManifestError, SignatureError, StoreError, StoreUnavailableError
from compileflow.settings import Settings, get_settings
from compileflow.spec import CompileSpec
from compileflow.stores.layout import split_uri

logger = logging.getLogger(__name__)
_CLOCK_DIFFERENCE = timedelta(days=1)


@dataclass(frozen=True)
class Verification:
    """Result of `verify_artifact`.

    Attributes:
        digest: Digest of the artifact: from its URI, or computed from the files of its folder.
        files: Number of files that the manifest lists, plus the manifest; 0 if the store has no sound artifact.
        intact: Whether every byte is as the manifest lists it.
        attested: Whether provenance and verdict exist, are about this artifact, and agree with it.
        signed_by: Ids of the trusted keys that signed at least one of the two statements.
        verdict: Attestations verdict: PASSED, WARNED or FAILED; None without one.
        report_intact: Whether the report is the one that the verdict names; None if it was not checked.
        validated_on: When the validation ended, in UTC; None if no statement says it.
        problems: One line for everything that is altered, or missing and required; () if there are none.
    """

    digest: str
    files: int
    intact: bool
    attested: bool
    signed_by: tuple[str, ...]
    verdict: str | None
    report_intact: bool | None
    validated_on: str | None
    problems: tuple[str, ...]


def attestations_of(location: str | Path, *, settings: Settings | None = None) -> tuple[Envelope, ...]:
    """Return the envelopes of an artifact, not verified: provenance, verdict, one of them, or ().

    For a folder, they come from the bundle file in it. For a URI, they come from the store; if the store has none
    or does not answer, from the bundle file that was fetched with the artifact.

    Raises:
        SignatureError: The bundle file cannot be read.
        StoreError: The store refused, or it did not answer and the artifact was never fetched.
        LoadError: The location is empty.
    """
    text = str(location)
    if "://" not in text:
        return read_bundle(path_of(location))
    settings = settings or get_settings()
    store_uri, digest = split_uri(text)
    cache = cached_folder(digest, settings)
    try:
        envelopes = stored_envelopes(open_store(store_uri, settings), digest)
    except StoreUnavailableError:
        if not cache.exists():
            raise
        envelopes = ()
    return envelopes or read_bundle(cache)


def last_result(artifact_uri: str, settings: Settings) -> str | None:
    """Return the result of the last validation of a stored artifact: PASSED, WARNED or FAILED.

    None if its store has no verdict on it, or cannot be read, which the log says.

    Raises:
        SignatureError: The statement is about another artifact, or a trusted key's signature does not match it.
    """
    try:
        return _statements(artifact_uri, settings, source=None).result
    except (ManifestError, StoreError) as error:
        logger.warning(
            "The last validation of %s is unknown: %s", without_credentials(artifact_uri), error.message
        )
        return None


def last_report(artifact_uri: str, settings: Settings) -> str | None:
    """Return the digest of the report of the last validation of a stored artifact; None without a verdict on it.

    Raises:
        ManifestError: The URI does not name a stored folder.
        SignatureError: The statement is about another artifact, or a trusted key's signature does not match it.
        StoreError: The store refused, or did not answer.
    """
    verdict = _statements(artifact_uri, settings, source=None).verdict
    return None if verdict is None else report_digest(verdict.statement)


def _statements(artifact_uri: str, settings: Settings, *, source: str | None) -> Attestations:
    """Verify the statements that the store holds about an artifact with the configured keys, if there are any."""
    store_uri, digest = split_uri(artifact_uri)
    paths = configured_keys(settings)
    return verify_attestations(
        digest,
        stored_envelopes(open_store(store_uri, settings), digest),
        trusted_keys=load_public_keys(paths) if paths or settings.require_signature else (),
        require_signature=settings.require_signature and source is not None,
        manifest_source=source,
    )


def verify_artifact(
    location: str | Path,
    *,
    settings: Settings,
    keys: Sequence[str | Path] = (),
    require_signature: bool | None = None,
    versions: Sequence[ModelVersion] = (),
    max_age: timedelta | None = None,
) -> Verification:
    """Verify files, statements, signatures and, for an artifact in a store, the report. Opens no compiled file.

    Args:
        location: Folder, or STORE/manifests/sha256/DIGEST.json.
        settings: Settings that name the cache and the trusted keys.
        keys: PEM files of public keys to trust instead of the configured ones.
        require_signature: Whether a missing statement or signature is a problem. None follows the settings.
        versions: Registered versions whose source model and spec the artifact must have.
        max_age: Longest time since the validation; None takes any verdict.

    Raises:
        ManifestError: The location does not hold an artifact.
        LoadError: The location is empty.
        SpecError: A key cannot be used, or a signature is required but no key is trusted.
        StoreUnavailableError: The store did not answer.
    """
    needs_signature = settings.require_signature if require_signature is None else require_signature
    paths = keys or configured_keys(settings)
    trusted_keys = load_public_keys(paths) if paths or needs_signature else ()
    problems: list[str] = []
    digest, manifest = _check_files(str(location), settings, problems)
    intact = not problems
    attestations = Attestations(None, None)
    try:
        envelopes = attestations_of(location, settings=settings)
        # The first pass reports what exists, even if the second one finds that something required is missing.
        for is_strict in (False, True) if needs_signature else (False,):
            attestations = verify_attestations(
                digest,
                envelopes,
                trusted_keys=trusted_keys,
                require_signature=is_strict,
                manifest_source=manifest.source.digest if manifest else None,
            )
    except SignatureError as error:
        problems.append(str(error))
    if manifest is not None:
        problems += (line for version in versions for line in contradictions(version, digest, manifest))
    if attestations.result is not None and attestations.result not in RESULTS:
        problems.append(
            f"The verdict has the unknown result {attestations.result!r:.80}. Validate the artifact again."
        )
    validated_on = finished_on(attestations.verdict.statement) if attestations.verdict is not None else None
    if validated_on is not None and validated_on - datetime.now(UTC) > _CLOCK_DIFFERENCE:
        problems.append(
            f"The verdict is dated {validated_on:%Y-%m-%d %H:%M} UTC, which is in the future. Check the clock of "
            "the machine that validated the artifact, and validate it again."
        )
    if max_age is not None and (validated_on is None or datetime.now(UTC) - validated_on > max_age):
        when = f"was validated on {validated_on:%Y-%m-%d %H:%M} UTC" if validated_on else "has no dated verdict"
        days = max_age / timedelta(days=1)
        problems.append(f"The artifact {when}, and a verdict may be {days:g} days old. Validate it again.")
    return Verification(
        digest=digest,
        files=len(manifest.files) + 1 if manifest else 0,
        intact=intact,
        attested=attestations.complete,
        signed_by=attestations.signed_by,
        verdict=attestations.result,
        report_intact=_check_report(str(location), attestations, settings, problems),
        validated_on=validated_on.isoformat() if validated_on else None,
        problems=tuple(problems),
    )


def check_version(version: ModelVersion, settings: Settings) -> Attestations:
    """Check that the store holds every byte of a version's artifact, and that it is what the registry says.

    Returns:
        The statements about the artifact, which the configured keys verified.

    Raises:
        IntegrityError: It is missing or altered, or contradicts what the registry says.
        ManifestError: The artifact's URI does not name a stored folder, or the manifest cannot be read.
        SignatureError: A statement is about another artifact or was altered; or the settings require signatures,
            and a statement or a trusted signature is missing, or the verdict is neither PASSED nor WARNED.
        SpecError: A configured key cannot be used, or a signature is required but no key is trusted.
        StoreError: The store refused, or did not answer.
    """
    contradictions, manifest = contradictions_of(version, settings)
    for contradiction in contradictions:
        raise IntegrityError(contradiction)
    return _statements(version.artifact_uri, settings, source=manifest.source.digest)


def contradictions_of(version: ModelVersion, settings: Settings) -> tuple[list[str], ArtifactManifest]:
    """Return what a registry says about an artifact and its manifest denies, one line each; and the manifest.

    Raises:
        IntegrityError: The artifact is missing or altered.
        ManifestError: The artifact's URI does not name a stored folder, or the manifest cannot be read.
        StoreError: The store refused, or did not answer.
    """
    store_uri, digest = split_uri(version.artifact_uri)
    with open_store(store_uri, settings).open_folder(digest) as folder:
        manifest, _ = verify_folder(folder)
    return contradictions(version, digest, manifest), manifest


def contradictions(version: ModelVersion, digest: str, manifest: ArtifactManifest) -> list[str]:
    """Return what a registry says about the artifact of a digest and its manifest denies, one line each."""
    claims = {
        "artifact": (version.artifact_digest, digest),
        "source model": (version.source_digest, manifest.source.digest),
        "target": (version.target, manifest.target.name),
    }
    lines = [
        f"{version.name} version {version.version} names the {part} {claimed[:12] or 'none'}, and the artifact is "
        f"of {found[:12]}. Do not serve it; find out who changed the registry or the store."
        for part, (claimed, found) in claims.items()
        if claimed != found
    ]
    try:
        # Fields that a version of an older compileflow lacks have their defaults.
        is_same = CompileSpec.model_validate(version.spec) == manifest.spec
    except ValidationError:
        is_same = False
    if not is_same:
        lines.append(
            f"{version.name} version {version.version} names another request than the one that the artifact was "
            "compiled for. Do not serve it; find out who changed the registry or the store."
        )
    return lines


def _check_files(location: str, settings: Settings, problems: list[str]) -> tuple[str, ArtifactManifest | None]:
    """Return the digest, and the manifest if it can be read; append what is altered to `problems`."""
    if "://" in location:
        store_uri, digest = split_uri(location)
        try:
            with open_store(store_uri, settings).open_folder(digest) as folder:
                return digest, verify_folder(folder)[0]
        except IntegrityError as error:
            problems.append(str(error))
            return digest, None
    folder = path_of(location).absolute()
    try:
        manifest, files = verify_folder(folder)
    except IntegrityError as error:
        problems.append(str(error))
        manifest, files = read_manifest(folder), artifact_files(folder)
    return folder_digest(files), manifest


def _check_report(
    location: str, attestations: Attestations, settings: Settings, problems: list[str]
) -> bool | None:
    """Say whether the store holds the report that the verdict names, unaltered; None if it names none."""
    digest = report_digest(attestations.verdict.statement) if attestations.verdict is not None else None
    if digest is None or "://" not in location:
        return None
    try:
        # The store compares every byte with this digest.
        with open_store(split_uri(location)[0], settings).open_folder(digest):
            return True
    except IntegrityError as error:
        problems.append(f"The report: {error}")
        return False
