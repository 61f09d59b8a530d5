"""Run the project's own tests on a stored artifact, in a child process with a time limit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from compileflow._process.run_in_child import run_in_child
from compileflow.errors import CompileflowError, ProcessTimeoutError
from compileflow.validation.project_tests import ProjectTests

_CHILD = "compileflow.validation.project_tests:run_tests"
# Characters of pytest's output that the report keeps.
_LONGEST_OUTPUT = 100_000


def run_project_tests(
    folder: str,
    *,
    artifact_dir: Path,
    source_dir: Path,
    registered_dir: Path | None,
    work_dir: Path,
    log_path: Path,
    timeout_s: float,
    threads: int,
    trust_remote_code: bool,
    on_progress: Callable[[str], None],
) -> ProjectTests:
    """Run a project's tests. Whatever goes wrong is part of the outcome, which the gates judge.

    Args:
        folder: Folder of tests.
        artifact_dir: Folder of the compiled model.
        source_dir: Folder of the source model.
        registered_dir: Folder of the test files that are registered with the source version; None without any.
        work_dir: Existing folder for temporary files.
        log_path: File for what pytest prints; deleted unless the process died.
        timeout_s: Seconds after which the tests are stopped.
        threads: Threads of both models.
        trust_remote_code: Run the Python files of the source model and of the artifact.
        on_progress: Called with one line for each stage.
    """
    path = Path(folder).expanduser().absolute()
    on_progress(f"running the project's tests in {path.name}")
    request = {
        "folder": str(path),
        "artifact_dir": str(artifact_dir),
        "source_dir": str(source_dir),
        "registered_dir": str(registered_dir) if registered_dir else None,
        "threads": threads,
        "trust_remote_code": trust_remote_code,
    }
    try:
        child = run_in_child(
            _CHILD,
            request,
            work_dir=work_dir,
            log_path=log_path,
            timeout_s=timeout_s,
            threads=threads,
            on_progress=on_progress,
        )
        tests, output = ProjectTests.model_validate(child.value), child.log
    except ProcessTimeoutError:
        tests, output = ProjectTests(problem=f"the tests ran past their limit of {timeout_s:g} s"), _text(log_path)
    except CompileflowError as error:
        tests, output = ProjectTests(problem=f"the tests died: {error.message}"), _text(log_path)
    on_progress(f"the project's tests: {tests.summary}")
    return tests.model_copy(update={"output": output[-_LONGEST_OUTPUT:]})


def _text(log_path: Path) -> str:
    return log_path.read_text("utf-8", "replace") if log_path.is_file() else ""
