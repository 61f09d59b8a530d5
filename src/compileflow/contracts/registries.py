"""The protocol of a model registry, and the values that describe registered versions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, get_args

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from compileflow.contracts.verdicts import AcceptedOutcome

Stage = Literal["none", "staging", "production", "archived"]
STAGES: tuple[Stage, ...] = get_args(Stage)


class VersionEntry(BaseModel):
    """What the registry records about one compiled model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=128)
    target: str
    spec: dict[str, JsonValue]
    source_uri: str
    source_revision: str
    source_digest: str
    artifact_uri: str
    artifact_digest: str
    verdict: AcceptedOutcome
    figures: dict[str, float]
    report_uri: str
    report_digest: str
    flow_run_id: str | None = None


class ModelVersion(VersionEntry):
    """A registered compiled model: the entry, its number, its time of creation and its stage."""

    version: int = Field(ge=1)
    created_at: str = Field(description="UTC, ISO 8601.")
    stage: Stage = "none"

    @property
    def entry(self) -> VersionEntry:
        """The entry, without the fields that the registry added."""
        return VersionEntry.model_validate(self.model_dump(include=set(VersionEntry.model_fields)))


class Promotion(BaseModel):
    """One change of a version's stage, or a note on it, which leaves the stage as it is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    at: str = Field(description="UTC, ISO 8601.")
    stage: Stage
    who: str
    reason: str = ""


@dataclass(frozen=True)
class VersionFiles:
    """Local folders with the files of an entry. A registry may keep copies; the store holds all of them.

    Attributes:
        artifact: Folder of the compiled model, with manifest.json.
        report: Folder with report.json and report.html.
        test_files: Folder with inputs.json, inference_params.json, and the compiled model's answers in
            predictions.json.
    """

    artifact: Path
    report: Path
    test_files: Path | None = None


def without_credentials(uri: str) -> str:
    """Return a URI without the user's name and password, so that errors may show it.

    >>> without_credentials("mlflow:https://me:secret@host:5000")
    'mlflow:https://host:5000'
    """
    return re.sub(r"//[^/@]*@", "//", uri)


class ModelRegistry(Protocol):
    """Named, numbered versions of compiled models."""

    uri: str

    def register(self, entry: VersionEntry, files: VersionFiles | None = None) -> ModelVersion:
        """Register a version, or return the version that already has this name and artifact digest.

        The next call with the same entry completes a call that was killed.
        """

    def find(self, artifact_digest: str) -> Sequence[ModelVersion]:
        """Return every version of an artifact, newest first."""

    def get(self, name: str, version: int | str) -> ModelVersion:
        """Return one version by its number or its stage.

        Raises:
            RegistryError: The name, number or stage does not exist; the hint lists those that do.
        """

    def versions(self, name: str | None = None, *, limit: int | None = None) -> Sequence[ModelVersion]:
        """Return all versions of one name, or of all names, newest first, or the newest ones only."""

    def compiled_from(self, source_uri: str) -> Sequence[ModelVersion]:
        """Return every version that was compiled from that source model, newest first."""

    def set_stage(self, name: str, version: int, stage: Stage, *, who: str, reason: str = "") -> ModelVersion:
        """Move a version to a stage, and archive the version that it replaces in staging or production."""

    def note(self, name: str, version: int, *, who: str, reason: str) -> Promotion:
        """Record a note on a version among its promotions. The version stays in its stage.

        Raises:
            RegistryError: The name or number does not exist.
        """

    def promotions(self, name: str, version: int) -> Sequence[Promotion]:
        """Return every change of a version's stage and every note on it, oldest first."""
