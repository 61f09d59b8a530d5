"""What a source of uncompiled models must be able to do, and the values that it exchanges with its caller."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from compileflow.spec import HfTask

# Files with a version's registered tests: inputs, parameters of the call, and the answers to them.
INPUTS_FILE, PARAMETERS_FILE, PREDICTIONS_FILE = "inputs.json", "inference_params.json", "predictions.json"
TEST_FILES = (INPUTS_FILE, PARAMETERS_FILE, PREDICTIONS_FILE)


@dataclass(frozen=True)
class LocatedSource:
    """A source model, pinned, with its files on this machine.

    Attributes:
        uri: Where it came from.
        revision: Commit, where the place knows one.
        folder: Where its files are.
        files: Those of the model, relative to `folder`.
        hf_task: What its model card says it serves; None where no card says.
        test_files: Folder with inputs.json, inference_params.json and predictions.json, where it has them.
    """

    uri: str
    revision: str
    folder: Path
    files: tuple[str, ...]
    hf_task: HfTask | None = None
    test_files: Path | None = None


class Source(Protocol):
    """A place that uncompiled models come from."""

    def pin(self, location: str, revision: str | None) -> tuple[str, str | None]:
        """Return the URI and, where the place itself knows one, the commit that `revision` means now."""

    def locate(self, location: str, revision: str | None, work_dir: Path) -> LocatedSource:
        """Bring the model's files to this machine; downloads go below `work_dir`."""
