"""The protocol of a source of uncompiled models, and the values that it exchanges with its caller."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from compileflow.spec import HfTask

# Files of a version's registered tests: inputs, parameters of the call, and answers.
INPUTS_FILE, PARAMETERS_FILE, PREDICTIONS_FILE = "inputs.json", "inference_params.json", "predictions.json"
TEST_FILES = (INPUTS_FILE, PARAMETERS_FILE, PREDICTIONS_FILE)


@dataclass(frozen=True)
class LocatedSource:
    """A source model, pinned, with its files on this machine.

    Attributes:
        uri: URI of the place that the model came from.
        revision: Commit of the model; "" for a place without commits.
        folder: Folder with the model's files.
        files: Paths of the model's files, relative to `folder`.
        hf_task: Task that the model card names; None without one.
        test_files: Folder with inputs.json, inference_params.json and predictions.json; None without them.
    """

    uri: str
    revision: str
    folder: Path
    files: tuple[str, ...]
    hf_task: HfTask | None = None
    test_files: Path | None = None


@dataclass(frozen=True)
class SourceVersion:
    """A registered version of an uncompiled model.

    Attributes:
        model: Location that a compile request gives.
        uri: URI that a compiled version records as its source.
        name: Name of the model in its registry.
        created_at: Time of its registration, UTC, ISO 8601.
        digest: Digest of its files; "" if it is unknown before a download.
    """

    model: str
    uri: str
    name: str
    created_at: str
    digest: str = ""


class Source(Protocol):
    """A place that provides uncompiled models."""

    def pin(self, location: str, revision: str | None) -> tuple[str, str | None]:
        """Return the URI and the current commit of `revision`; None for a place without commits."""

    def locate(self, location: str, revision: str | None, work_dir: Path) -> LocatedSource:
        """Bring the model's files to this machine; downloads go to `work_dir`."""


@runtime_checkable
class CheckingSource(Source, Protocol):
    """A source that can tell some wrong locations without its server. Optional."""

    def check(self, location: str, revision: str | None) -> None:
        """Refuse a location that is wrong on its own, or that this machine has no credentials for."""


@runtime_checkable
class ListingSource(Source, Protocol):
    """A source that lists the registered versions of uncompiled models. Optional."""

    def versions(self, place: str) -> Sequence[SourceVersion]:
        """Return the versions in a registry that are not compiled models, in any order.

        Args:
            place: URI of the registry.
        """
