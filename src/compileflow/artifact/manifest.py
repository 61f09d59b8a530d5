"""ArtifactManifest: what was made (manifest.json), of which files it consists, and what loading it needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, field_validator

from compileflow.contracts import SHA256, FileRecord
from compileflow.contracts.digests import list_files
from compileflow.contracts.records import ComponentRecord, Record
from compileflow.errors import IntegrityError, ManifestError, first_problem
from compileflow.spec import CompileSpec, HfTask

MANIFEST_NAME = "manifest.json"
# What is said of an artifact travels beside its files and is none of them: it names the artifact's digest.
ATTESTATIONS_NAME = "attestations.intoto.jsonl"
SCHEMA_VERSION: Literal[3] = 3
_READABLE = (1, 2, 3)


class SourceRecord(Record):
    """Which source model an artifact was compiled from."""

    uri: str = Field(description="hf://owner/name or file:///folder")
    revision: str = Field(description="Hub commit, or the folder's own digest.")
    digest: str = Field(pattern=SHA256, description="Digest of the source model's files.")
    architecture: str = Field(description="Model class, for example BertForSequenceClassification.")


class TargetRecord(Record):
    """Which target compiled an artifact, with which toolchain."""

    name: str
    version: int = Field(ge=1, description="The target's own version; raised when its output changes.")
    toolchain: dict[str, str] = Field(description="Distribution name to version, at compile time.")
    cpu_features: tuple[str, ...] = Field((), description="CPU features that were baked in; () when none.")


class CalibrationRecord(Record):
    """Which natural examples a static quantisation looked at."""

    origin: str = Field(description="File name, or compileflow's own.")
    digest: str = Field(pattern=SHA256, description="SHA-256 of that file.")
    examples: int = Field(ge=1, description="How many of its examples were used.")


class ArtifactManifest(Record):
    """Everything that a reader needs before it opens a compiled file.

    It holds no time and no measurement: the same source, spec and toolchain give the same manifest.
    """

    schema_version: Literal[1, 2, 3] = SCHEMA_VERSION
    spec: CompileSpec
    source: SourceRecord
    target: TargetRecord
    components: dict[str, ComponentRecord]
    files: tuple[FileRecord, ...] = Field(description="Every file but manifest.json itself.")
    calibration: CalibrationRecord | None = Field(None, description="Where the precision was calibrated.")

    @field_validator("files")
    @classmethod
    def _attestations_are_no_file(cls, files: tuple[FileRecord, ...]) -> tuple[FileRecord, ...]:
        if any(record.path == ATTESTATIONS_NAME for record in files):
            raise ValueError(f"{ATTESTATIONS_NAME} is no file of an artifact")
        return files

    @property
    def hf_task(self) -> HfTask:
        """Hub task that the artifact serves."""
        return self.spec.hf_task

    @property
    def size_bytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(record.size_bytes for record in self.files)

    def write(self, folder: Path) -> Path:
        """Write manifest.json below `folder` and return its path."""
        path = folder / MANIFEST_NAME
        path.write_text(json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True) + "\n", "utf-8")
        return path


def read_manifest(folder: Path) -> ArtifactManifest:
    """Read and check manifest.json, and nothing else.

    Raises:
        ManifestError: it is absent, not JSON, of an unknown schema_version, or its fields are wrong.
        IntegrityError: it names a file outside its folder.
    """
    path = folder / MANIFEST_NAME
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ManifestError(
            f"{folder} has no {MANIFEST_NAME}.", hint="Give the folder of a compiled artifact."
        ) from error
    except NotADirectoryError as error:
        raise ManifestError(f"{folder} is not a folder.", hint="Give an artifact's folder.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ManifestError(f"{path} cannot be read: {error}.", hint="Fetch the artifact again.") from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version not in _READABLE:
        raise ManifestError(
            f"{path} has schema_version {version!r}; this compileflow reads {', '.join(map(str, _READABLE))}.",
            hint="Install the compileflow that made it, or compile the model again.",
        )
    try:
        return ArtifactManifest.model_validate(data)
    except ValidationError as error:
        problem = first_problem(error)
        if "leaves its folder" in problem:
            raise IntegrityError(
                f"{path}: {problem}.", hint="Do not load this artifact; fetch it again."
            ) from error
        raise ManifestError(f"{path}: {problem}.", hint="Fetch the artifact again.") from error


def verify_folder(folder: Path) -> tuple[ArtifactManifest, tuple[FileRecord, ...]]:
    """Check every file of an artifact against its manifest, before anything is deserialised.

    The file of attestations is passed over, and changes no digest.

    Returns:
        The manifest, and the records of all files with manifest.json, whose digest is the artifact's.

    Raises:
        ManifestError: see `read_manifest`.
        IntegrityError: a file is missing, altered, not listed, or outside the folder.
    """
    manifest = read_manifest(folder)
    found = {record.path: record for record in list_files(folder)}
    own = found.pop(MANIFEST_NAME)
    found.pop(ATTESTATIONS_NAME, None)
    hint = "Do not load this artifact; fetch it again."
    for record in manifest.files:
        have = found.pop(record.path, None)
        if have is None:
            raise IntegrityError(f"{folder}: {record.path} is missing.", hint=hint)
        if have != record:
            raise IntegrityError(
                f"{folder}: {record.path} was altered: SHA-256 {have.sha256[:12]}..., "
                f"the manifest says {record.sha256[:12]}...",
                hint=hint,
            )
    if found:
        raise IntegrityError(f"{folder}: {sorted(found)[0]} is not in the manifest.", hint=hint)
    return manifest, (*manifest.files, own)
