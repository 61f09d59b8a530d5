"""Whether an artifact's bytes are those that its manifest lists, and its digest the one that was asked for."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from compileflow.artifact.manifest import (
    ATTESTATIONS_NAME,
    MANIFEST_NAME,
    ArtifactManifest,
    read_manifest,
    verify_folder,
)
from compileflow.contracts import FileRecord
from compileflow.contracts.digests import folder_digest, list_files
from compileflow.errors import IntegrityError, SpecError

logger = logging.getLogger(__name__)

_DIGEST = re.compile(r"[0-9a-f]{12,64}")


@dataclass(frozen=True)
class CheckedFolder:
    """An artifact's folder, none of whose files but the manifest was opened by anything that runs it.

    Attributes:
        manifest: What was made.
        digest: The folder's own, of what is there.
        verified: Whether every file is the one that the manifest lists, and no other is there.
    """

    manifest: ArtifactManifest
    digest: str
    verified: bool


def check_folder(folder: Path, *, trust: bool, hint: str) -> CheckedFolder:
    """Compare every file with the manifest; with `trust`, altered and unlisted files are only logged.

    Args:
        folder: Of this machine.
        trust: Whether they may differ.
        hint: What to do if they may not, and do.

    Raises:
        ManifestError: there is no manifest, or of an unknown schema_version.
        IntegrityError: a file is missing or outside the folder, or without `trust` altered or unlisted.
    """
    try:
        manifest, files = verify_folder(folder)
        return CheckedFolder(manifest, folder_digest(files), verified=True)
    except IntegrityError as error:
        # Both raise again what no trust excuses: a path or a link that leaves the folder.
        manifest, files = read_manifest(folder), artifact_files(folder)
        listed = {record.path: record for record in manifest.files}
        if listed.keys() - {record.path for record in files}:
            raise
        if not trust:
            raise IntegrityError(error.message, hint=hint) from error
    unverified = [
        record.path for record in files if record.path != MANIFEST_NAME and listed.get(record.path) != record
    ]
    logger.warning(
        "%s is loaded unverified, because of trust=True: %s differ from the manifest or are not in it.",
        folder,
        ", ".join(unverified),
    )
    return CheckedFolder(manifest, folder_digest(files), verified=False)


def artifact_files(folder: Path) -> tuple[FileRecord, ...]:
    """Hash the files that an artifact's digest is made of: all but what is said of it."""
    return tuple(record for record in list_files(folder) if record.path != ATTESTATIONS_NAME)


def check_is_digest(text: str) -> None:
    """Refuse what is neither an artifact's digest nor its first 12 digits or more.

    Raises:
        SpecError: it is no digest.
    """
    if _DIGEST.fullmatch(text) is None:
        raise SpecError(
            f"digest={text!r} is no digest: needed are 12 to 64 of the digits 0-9 and a-f.",
            hint="Copy it from `compileflow versions`, or from the end of the artifact's URI.",
        )


def check_same(where: str, found: str, asked: str, *, hint: str) -> None:
    """Compare an artifact's digest with the one that was asked for, or with its beginning.

    Raises:
        IntegrityError: it is another artifact.
    """
    if not found.startswith(asked):
        raise IntegrityError(f"{where} has the digest {found[:12]}..., asked for was {asked[:12]}...", hint=hint)
