"""ArtifactManifest, the content of manifest.json: what was compiled, its files, and what loading needs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import FailFast, Field, ValidationError, field_validator, model_validator

from compileflow._process.folders import os_errors
from compileflow.contracts import SHA256, FileRecord, Target
from compileflow.contracts.digests import folder_digest, list_files
from compileflow.contracts.json_files import read_json
from compileflow.contracts.records import ComponentRecord, Record
from compileflow.errors import IntegrityError, ManifestError, first_problem, redacted
from compileflow.spec import CompileSpec, HfTask

MANIFEST_NAME = "manifest.json"
# This file lies beside the artifact's files but does not belong to them, because it names the artifact's digest.
ATTESTATIONS_NAME = "attestations.intoto.jsonl"
# The uncompiled pipeline, which CompiledPipeline.save_pretrained adds. The manifest's source digest covers it.
ORIGINAL_FOLDER = "pipeline"
# The artifact in a folder that AutoCompiler wrote.
INSTRUCTIONS_FOLDER = "inst"
SCHEMA_VERSION: Literal[3] = 3
_READABLE = (1, 2, 3)
# A manifest of 10,000 files has about 2 MB.
_MOST_BYTES = 4 * 2**20
_FETCH_AGAIN = "Fetch the artifact again. If a newer compileflow wrote it, update compileflow."


class SourceRecord(Record):
    """The source model that an artifact was compiled from."""

    uri: str = Field(description="hf://owner/name or file:///folder")
    revision: str = Field(description="Hub commit, or the digest of the folder.")
    digest: str = Field(pattern=SHA256, description="Digest of the source model's files.")
    architecture: str = Field(
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        max_length=200,
        description="Model class, for example BertForSequenceClassification.",
    )


class TargetRecord(Record):
    """The target and the toolchain that compiled an artifact."""

    name: str
    version: int = Field(ge=1, description="Version of the target's code; it increases when the output changes.")
    toolchain: dict[str, str] = Field(description="Distribution name to its version at compile time.")
    cpu_features: tuple[str, ...] = Field((), description="CPU features that the files need; () if none.")

    @classmethod
    def of(cls, target: Target) -> Self:
        """Return the record of a target and of its toolchain on this machine."""
        return cls(
            name=target.name,
            version=target.version,
            toolchain=target.toolchain(),
            cpu_features=target.cpu_features(),
        )


class CalibrationRecord(Record):
    """The natural examples that calibrated a static quantization."""

    origin: str = Field(description="Name of the file, or of the examples in compileflow.")
    digest: str = Field(pattern=SHA256, description="SHA-256 of the file.")
    examples: int = Field(ge=1, description="Number of examples that were used.")


class ArtifactManifest(Record):
    """Everything that a reader needs to know before it opens a compiled file.

    The manifest holds neither times nor measurements, so the same source, spec and toolchain give the same
    manifest.
    """

    schema_version: Literal[1, 2, 3] = SCHEMA_VERSION
    spec: CompileSpec
    source: SourceRecord
    target: TargetRecord
    components: dict[str, ComponentRecord] = Field(min_length=1)
    files: Annotated[tuple[FileRecord, ...], FailFast()] = Field(description="Every file except manifest.json.")
    calibration: CalibrationRecord | None = Field(None, description="Calibration of a quantized artifact.")

    @field_validator("files")
    @classmethod
    def _each_file_is_listed_once(cls, files: tuple[FileRecord, ...]) -> tuple[FileRecord, ...]:
        if any(record.path == ATTESTATIONS_NAME for record in files):
            raise ValueError(f"{ATTESTATIONS_NAME} must not be listed as a file of the artifact")
        path, count = Counter(record.path for record in files).most_common(1)[0] if files else ("", 1)
        if count > 1:
            raise ValueError(f"{path} is listed {count} times")
        return files

    @model_validator(mode="after")
    def _spec_names_the_components(self) -> Self:
        names = {component.name for component in self.spec.components}
        if names != set(self.components):
            raise ValueError(
                f"components are {', '.join(sorted(self.components))}, but spec names {', '.join(sorted(names))}"
            )
        return self

    @property
    def hf_task(self) -> HfTask:
        """Hub task of the artifact."""
        return self.spec.hf_task

    @property
    def size_bytes(self) -> int:
        """Size of all files except the manifest."""
        return sum(record.size_bytes for record in self.files)

    @property
    def python_files(self) -> tuple[str, ...]:
        """Python files of the artifact; a load runs them only if its caller trusts them."""
        return tuple(record.path for record in self.files if record.path.endswith(".py"))

    def write(self, folder: Path) -> Path:
        """Write manifest.json into `folder` and return the path."""
        path = folder / MANIFEST_NAME
        path.write_text(json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True) + "\n", "utf-8")
        return path


def read_manifest(folder: Path) -> ArtifactManifest:
    """Read and check manifest.json without looking at the other files.

    Raises:
        ManifestError: The file is missing or not JSON, its schema_version is unknown, or a field is invalid.
        IntegrityError: The manifest names a file outside its folder.
    """
    path = folder / MANIFEST_NAME
    try:
        data: Any = read_json(path, most_bytes=_MOST_BYTES, strict=True)
    except FileNotFoundError as error:
        problem = f"{folder} has no {MANIFEST_NAME}" if folder.is_dir() else f"{folder} does not exist"
        raise ManifestError(
            f"{problem}.",
            hint="Give the folder of a compiled artifact, or a registered model as registry:NAME.",
        ) from redacted(error)
    except NotADirectoryError as error:
        raise ManifestError(
            f"{folder} is not a folder.", hint="Give the folder of a compiled artifact."
        ) from redacted(error)
    except (OSError, ValueError) as error:
        raise ManifestError(f"{path} cannot be read: {error}.", hint="Fetch the artifact again.") from redacted(
            error
        )
    version = data.get("schema_version") if isinstance(data, dict) else None
    # 3.0 and true are equal to numbers, but no version of compileflow writes them.
    if type(version) is not int or version not in _READABLE:
        raise ManifestError(
            f"{path}: expected schema_version {', '.join(map(str, _READABLE))}, found {version!r}.",
            hint="Install the version of compileflow that wrote it, or compile the model again.",
        )
    try:
        return ArtifactManifest.model_validate(data)
    except ValidationError as error:
        problem = first_problem(error)
        if "leaves its folder" in problem:
            raise IntegrityError(
                f"{path}: {problem}.", hint="Do not load this artifact; fetch it again."
            ) from error
        raise ManifestError(f"{path}: {problem}.", hint=_FETCH_AGAIN) from error


def listed_digest(folder: Path, manifest: ArtifactManifest) -> str:
    """Return the digest of an artifact whose files are as its manifest lists them; only the manifest is read."""
    return folder_digest((*manifest.files, *list_files(folder, paths=(MANIFEST_NAME,))))


def artifact_files(folder: Path) -> tuple[FileRecord, ...]:
    """Hash the files that make up an artifact's digest: all but the attestations and the original pipeline."""
    with os_errors(folder, "read", kind=IntegrityError):
        return list_files(folder, without=(f"{ORIGINAL_FOLDER}/", ATTESTATIONS_NAME))


def verify_folder(folder: Path) -> tuple[ArtifactManifest, tuple[FileRecord, ...]]:
    """Compare every file of an artifact with its manifest, before any file is deserialized.

    The attestations and the original pipeline are ignored and do not change the digest.

    Returns:
        The manifest, and the records of all files including manifest.json. Their digest is the artifact's digest.

    Raises:
        ManifestError: See `read_manifest`.
        IntegrityError: A file is missing, altered, not listed, or outside the folder.
    """
    manifest = read_manifest(folder)
    remaining_files = {record.path: record for record in artifact_files(folder)}
    manifest_record = remaining_files.pop(MANIFEST_NAME)
    hint = "Do not load this artifact; fetch it again."
    for record in manifest.files:
        file = remaining_files.pop(record.path, None)
        if file is None:
            raise IntegrityError(f"{folder}: {record.path} is missing.", hint=hint)
        if file != record:
            raise IntegrityError(
                f"{folder}: {record.path} was altered: expected SHA-256 {record.sha256[:12]}..., "
                f"found {file.sha256[:12]}...",
                hint=hint,
            )
    if remaining_files:
        raise IntegrityError(f"{folder}: {sorted(remaining_files)[0]} is not in the manifest.", hint=hint)
    return manifest, (*manifest.files, manifest_record)
