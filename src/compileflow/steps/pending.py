"""PendingValidation: what a machine with the device needs to know, besides the recorded reference, to validate."""

from __future__ import annotations

import shutil
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from compileflow.errors import ManifestError, first_problem
from compileflow.spec import CompileSpec
from compileflow.steps.request import CompileRequest
from compileflow.steps.values import CompiledArtifact, FetchedSource
from compileflow.validation.settings import ValidationSettings

_PENDING_JSON, _TESTS, _EXAMPLES = "pending.json", "tests", "examples"


class PendingValidation(BaseModel):
    """A validation that waits for a machine with the device.

    Attributes:
        source: Source model.
        artifact: Artifact to validate.
        spec: What was requested; None if unknown.
        validation: How to validate.
        suite: Text and origin of the user's suite.
        request: Request of the run, for the registration.
        request_digest: Key of the validation in the cache of the step.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: FetchedSource
    artifact: CompiledArtifact
    spec: CompileSpec | None
    validation: ValidationSettings
    suite: dict[str, str] | None
    request: CompileRequest | None
    request_digest: str

    def write(self, folder: Path, *, tests_dir: Path | None) -> None:
        """Write pending.json into the folder of the recorded reference, with the files that it refers to.

        Args:
            folder: Folder of the recorded reference.
            tests_dir: Registered tests of the source version; None without any.
        """
        if tests_dir is not None:
            shutil.copytree(tests_dir, folder / _TESTS)
        if self.validation.examples_path is not None:
            examples = Path(self.validation.examples_path).expanduser()
            (folder / _EXAMPLES).mkdir()
            shutil.copyfile(examples, folder / _EXAMPLES / examples.name)
        (folder / _PENDING_JSON).write_text(self.model_dump_json(indent=1) + "\n", "utf-8")

    @classmethod
    def read(cls, folder: Path) -> PendingValidation:
        """Read pending.json from the folder of a recorded reference.

        Raises:
            ManifestError: It cannot be read.
        """
        try:
            return cls.model_validate_json((folder / _PENDING_JSON).read_bytes())
        except (OSError, ValidationError) as error:
            problem = first_problem(error) if isinstance(error, ValidationError) else str(error.strerror)
            raise ManifestError(
                f"The recorded reference cannot be read: {problem}.",
                hint="Use the version of compileflow that recorded it, or compile again.",
            ) from error

    def local_validation(self, folder: Path) -> ValidationSettings:
        """Return the settings of the validation, with the examples in the folder of the recorded reference."""
        path = self.validation.examples_path
        examples = None if path is None else str(folder / _EXAMPLES / Path(path).name)
        # The suite's text is in pending.json.
        return self.validation.model_copy(update={"examples_path": examples, "suite_path": None})


def recorded_tests(folder: Path) -> Path | None:
    """Return the folder of the registered tests in a recorded reference; None without any."""
    return folder / _TESTS if (folder / _TESTS).is_dir() else None
