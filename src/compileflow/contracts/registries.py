"""Registered versions of compiled models, and what a model registry must be able to do."""

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
    """What is registered about one compiled model."""

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
    """A registered compiled model: the entry, its number, when it was made, and the stage it is in."""

    version: int = Field(ge=1)
    created_at: str = Field(description="UTC, ISO 8601.")
    stage: Stage = "none"

    @property
    def entry(self) -> VersionEntry:
        """What was registered, without what the registry added."""
        return VersionEntry.model_validate(self.model_dump(include=set(VersionEntry.model_fields)))


class Promotion(BaseModel):
    """One change of a version's stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    at: str = Field(description="UTC, ISO 8601.")
    stage: Stage
    who: str
    reason: str = ""


@dataclass(frozen=True)
class VersionFiles:
    """Folders of this machine with what an entry refers to. A registry may keep copies; the store has all of it.

    Attributes:
        artifact: The compiled model, with manifest.json.
        report: report.json and report.html.
        test_files: inputs.json, inference_params.json, and in predictions.json what the compiled model answers.
    """

    artifact: Path
    report: Path
    test_files: Path | None = None


def without_credentials(uri: str) -> str:
    """Return a URI as it may be shown, without a user's name and password.

    >>> without_credentials("mlflow:https://me:secret@host:5000")
    'mlflow:https://host:5000'
    """
    return re.sub(r"//[^/@]*@", "//", uri)


class ModelRegistry(Protocol):
    """Named, numbered versions of compiled models."""

    uri: str

    def register(self, entry: VersionEntry, files: VersionFiles | None = None) -> ModelVersion:
        """Register a version; the same name and artifact digest again give the version that exists.

        A call that was killed is completed by the next one with the same entry.
        """

    def find(self, artifact_digest: str) -> Sequence[ModelVersion]:
        """Return every version of that artifact, newest first."""

    def get(self, name: str, version: int | str) -> ModelVersion:
        """Return one version, by its number or by the stage it is in.

        Raises:
            RegistryError: no such name, number or stage; the hint lists what there is.
        """

    def versions(self, name: str | None = None) -> Sequence[ModelVersion]:
        """Return all versions, of one name or of all, newest first."""

    def compiled_from(self, source_uri: str) -> Sequence[ModelVersion]:
        """Return every version that was compiled from that source model, newest first."""

    def set_stage(self, name: str, version: int, stage: Stage, *, who: str, reason: str = "") -> ModelVersion:
        """Move a version to a stage. The one that was in staging or production before it is archived."""

    def promotions(self, name: str, version: int) -> Sequence[Promotion]:
        """Return every change of a version's stage, oldest first."""
