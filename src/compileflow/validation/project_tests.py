"""The project's own tests: a folder of pytest tests that the compiled model must pass.

The validate step runs them in a child process. The tests get the fixtures of `model_fixtures`, which their
conftest.py may replace. They are code of the project and run with the rights of the worker.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from compileflow.artifact.open import open_artifact
from compileflow.contracts.digests import folder_digest, list_files
from compileflow.errors import SpecError
from compileflow.validation.measure.measurements import Measurements

# Gate on the number of tests that fail.
GATE = "project_tests"
# Metrics of the suite file.
_FAILED, _UNUSABLE = "failed_project_tests", "unusable_project_tests"
_PATTERNS = ("test_*.py", "*_test.py")
_MOST_NAMES = 5


class ProjectTests(BaseModel):
    """The outcome of a project's tests.

    Attributes:
        passed: Number of tests that passed.
        failed: Names of the tests that failed.
        skipped: Number of tests that were skipped, or failed as expected.
        problem: Why the tests show nothing: for example, a file cannot be imported; "" if they do.
        output: What pytest printed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    passed: int = Field(0, ge=0)
    failed: tuple[str, ...] = ()
    skipped: int = Field(0, ge=0)
    problem: str = ""
    output: str = ""

    @property
    def summary(self) -> str:
        """The outcome in one line."""
        names = ", ".join(self.failed[:_MOST_NAMES])
        others = f" and {len(self.failed) - _MOST_NAMES} more" if len(self.failed) > _MOST_NAMES else ""
        counts = f"{self.passed} passed, {len(self.failed)} failed, {self.skipped} skipped"
        return self.problem or (f"{counts}: {names}{others}" if self.failed else counts)

    def measure(self, measurements: Measurements) -> None:
        """Record the outcome for the gates."""
        measurements.scalars[_UNUSABLE] = float(bool(self.problem))
        measurements.details[_UNUSABLE] = measurements.details[_FAILED] = self.summary
        if not self.problem:
            measurements.scalars[_FAILED] = float(len(self.failed))


def check_tests(folder: str) -> None:
    """Check that a folder holds tests, without importing them.

    Raises:
        SpecError: The folder does not exist, or has no file of tests.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise SpecError(f"The folder of tests {folder} does not exist.", hint="Check tests_path.")
    if not any(next(path.rglob(pattern), None) for pattern in _PATTERNS):
        raise SpecError(
            f"The folder of tests {folder} has no file of tests.", hint=f"Name one {' or '.join(_PATTERNS)}."
        )


def digest_of_tests(folder: str) -> str:
    """Return the digest of a folder of tests, without what Python and pytest leave in it."""
    path = Path(folder).expanduser()
    names = [
        file.relative_to(path).as_posix()
        for file in sorted(path.rglob("*"))
        if file.is_file() and not {"__pycache__", ".pytest_cache"} & set(file.parts)
    ]
    return folder_digest(list_files(path, paths=names))


def run_tests(request: Mapping[str, Any]) -> dict[str, Any]:
    """Run a project's tests. Runs in a child process, whose log gets what pytest prints.

    Args:
        request: What `steps.project_tests` sends: "folder", "artifact_dir", "source_dir", "registered_dir",
            "threads" and "trust_remote_code".

    Returns:
        The fields of `ProjectTests` except its output.
    """
    import pytest
    import torch

    from compileflow.validation import model_fixtures

    torch.set_num_threads(int(request["threads"]))
    folder = Path(request["folder"])
    models = model_fixtures.ModelsUnderTest(
        artifact=open_artifact(
            request["artifact_dir"],
            require_signature=False,
            trust_remote_code=bool(request["trust_remote_code"]),
        ),
        source_dir=Path(request["source_dir"]),
        folder=folder,
        registered_dir=Path(request["registered_dir"]) if request["registered_dir"] else None,
        threads=int(request["threads"]),
    )
    outcomes = _Outcomes()
    # The folder belongs to the project: nothing is written there, and no settings from above it apply.
    sys.dont_write_bytecode = True
    os.environ.pop("PYTEST_ADDOPTS", None)
    settings = folder / "pytest.ini"
    code = pytest.main(
        [
            str(folder),
            f"--rootdir={folder}",
            f"--confcutdir={folder}",
            f"--config-file={settings if settings.is_file() else os.devnull}",
            "-p",
            "no:cacheprovider",
            "--verbose",
            "--color=no",
            "--tb=short",
        ],
        plugins=[model_fixtures, models, outcomes],
    )
    return outcomes.result(int(code)).model_dump(mode="json", exclude={"output"})


class _Outcomes:
    """Counts the outcomes of tests, as a plugin of pytest."""

    def __init__(self) -> None:
        self._passed, self._skipped = 0, 0
        # A test may fail and then its teardown as well.
        self._failed: dict[str, None] = {}
        self._broken_files: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self._failed[report.nodeid] = None
        elif report.skipped:
            self._skipped += 1
        elif report.when == "call":
            self._passed += 1

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            error = [line for line in str(report.longrepr).splitlines() if line.startswith("E ")]
            reason = error[-1].removeprefix("E ").strip() if error else "its collection failed"
            self._broken_files.append(f"{report.nodeid}: {reason}")

    def result(self, code: int) -> ProjectTests:
        """Return the outcome.

        Args:
            code: Exit code of pytest.
        """
        problem = ""
        if self._broken_files:
            problem = f"{len(self._broken_files)} files cannot be collected, first {self._broken_files[0]}"
        elif not self._passed and not self._failed:
            count = f"all {self._skipped} tests were skipped" if self._skipped else "no test was found"
            problem = f"{count}, so nothing was shown (pytest ended with exit code {code})"
        elif code not in (0, 1):
            problem = f"pytest ended with exit code {code} before all tests ran"
        return ProjectTests(
            passed=self._passed, failed=tuple(self._failed), skipped=self._skipped, problem=problem
        )
