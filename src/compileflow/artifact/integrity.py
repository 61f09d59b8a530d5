"""Check that an artifact's bytes are those that its manifest lists, and that its digest is the expected one."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from compileflow.artifact.manifest import (
    MANIFEST_NAME,
    ArtifactManifest,
    artifact_files,
    read_manifest,
    verify_folder,
)
from compileflow.contracts import ModelVersion
from compileflow.contracts.digests import folder_digest
from compileflow.errors import IntegrityError, SpecError
from compileflow.stores.layout import split_uri

logger = logging.getLogger(__name__)

_DIGEST = re.compile(r"[0-9a-f]{12,64}")


@dataclass(frozen=True)
class CheckedFolder:
    """Result of `check_folder`. Only the manifest has been parsed so far; no compiled file has been opened.

    Attributes:
        manifest: Manifest of the artifact.
        digest: Digest of the files that are in the folder.
        verified: Whether every file matches the manifest and the folder holds no other file.
    """

    manifest: ArtifactManifest
    digest: str
    verified: bool


def check_folder(folder: Path, *, trust: bool, hint: str) -> CheckedFolder:
    """Compare every file of an artifact with its manifest.

    Args:
        folder: Folder on this machine.
        trust: Accept altered and unlisted files, with a warning in the log.
        hint: What the error tells the user to do.

    Raises:
        ManifestError: The manifest is missing, or its schema_version is unknown.
        IntegrityError: A file is missing or outside the folder; without `trust`, a file is altered or unlisted.
    """
    try:
        manifest, files = verify_folder(folder)
        return CheckedFolder(manifest, folder_digest(files), verified=True)
    except IntegrityError as error:
        # Both calls raise again if a path or a link leaves the folder, which `trust` does not excuse.
        manifest, files = read_manifest(folder), artifact_files(folder)
        manifest_records = {record.path: record for record in manifest.files}
        if manifest_records.keys() - {record.path for record in files}:
            raise
        if not trust:
            raise IntegrityError(error.message, hint=hint) from error
    altered_files = [
        record.path
        for record in files
        if record.path != MANIFEST_NAME and manifest_records.get(record.path) != record
    ]
    logger.warning(
        "Loading %s unverified, because of trust=True: %s differ from the manifest or are not listed in it.",
        folder,
        ", ".join(altered_files),
    )
    return CheckedFolder(manifest, folder_digest(files), verified=False)


def check_digest_format(text: object) -> None:
    """Check that a text is an artifact's digest, or at least its first 12 digits.

    Raises:
        SpecError: The text is not a digest.
    """
    if not isinstance(text, str) or _DIGEST.fullmatch(text) is None:
        raise SpecError(
            f"Expected a digest of 12 to 64 of the digits 0-9 and a-f, got digest={text!r}.",
            hint="Copy the digest from `compileflow versions`, or from the end of the artifact's URI.",
        )


def check_typed_digest(location: str, digest: str, typed: str, *, hint: str) -> None:
    """Compare the digest of an artifact with the one that a user gave, which may be shortened to its first digits.

    Raises:
        IntegrityError: The digests differ.
    """
    if not digest.startswith(typed):
        raise _mismatch(location, digest, typed, hint)


def check_digest(location: str, digest: str, expected: str, *, hint: str) -> None:
    """Compare the digest of an artifact with the expected digest, for example a registry's.

    Raises:
        IntegrityError: The digests differ.
    """
    if digest != expected:
        raise _mismatch(location, digest, expected, hint)


def check_registered_uri(version: ModelVersion) -> None:
    """Check that the URI of a registered version names the artifact that was registered, with its whole digest.

    Raises:
        IntegrityError: It names another one.
        ManifestError: The URI does not name a stored folder.
    """
    subject = f"the URI of {version.name} version {version.version}"
    hint = "Do not use this version; it was changed in the registry."
    check_digest(subject, split_uri(version.artifact_uri)[1], version.artifact_digest, hint=hint)


def _mismatch(location: str, digest: str, expected: str, hint: str) -> IntegrityError:
    return IntegrityError(
        f"Digest mismatch for {location}: expected {expected[:12] or 'none'}..., found {digest[:12]}...", hint=hint
    )
