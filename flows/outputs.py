"""The outputs folder of a project: what each step of a run left, for a person to look into.

The store and the registry hold the results; nothing reads this folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from compileflow._process.folders import check_writable, os_errors
from compileflow.catalog import open_store
from compileflow.contracts import ModelVersion
from compileflow.errors import CompileflowError
from compileflow.settings import Settings
from compileflow.steps.request import CompileRequest
from compileflow.steps.values import CompiledArtifact, FetchedSource, ValidatedArtifact
from compileflow.stores.layout import split_uri

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State, TaskRun
    from prefect.tasks import Task

# Folder of each step.
_FOLDERS: Mapping[str, str] = {
    "fetch": "download",
    "compile": "compile",
    "validate": "validate",
    "register": "upload",
}
ERROR_FILE = "error.txt"


@dataclass(frozen=True)
class Outputs:
    """The outputs folders of one run of a project.

    Attributes:
        project: Name of the project.
        request: Request that runs. Only the folders of steps that are on are written.
        settings: The outputs folder, and the credentials of the store.
        results: Values of the tasks that ended, by step; of a task that failed, its error.
    """

    project: str
    request: CompileRequest
    settings: Settings
    results: dict[str, list[Any]] = field(default_factory=dict)

    def folder(self, step: str) -> Path:
        """Return the folder of a step."""
        return self.settings.outputs.expanduser() / _FOLDERS[step] / self.project

    @property
    def _steps(self) -> list[str]:
        return [step for step in _FOLDERS if getattr(self.request.steps, step)]

    def clear(self) -> None:
        """Delete the folder of each step that is on, which holds what an earlier run left.

        Raises:
            StoreError: A folder cannot be deleted, or none can be written.
        """
        with os_errors(self.settings.outputs, "write to the folder of COMPILEFLOW_OUTPUTS,"):
            check_writable(self.settings.outputs.expanduser())
        for folder in map(self.folder, self._steps):
            with os_errors(folder, "write to"):
                if folder.exists():
                    shutil.rmtree(folder)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Collect the values of all tasks that end inside the block, in this process."""
        # Prefect reads its settings when it is imported.
        from tasks.compile import compile_source
        from tasks.fetch import fetch
        from tasks.register import register
        from tasks.validate import validate

        tasks: dict[str, Task[..., Any]] = {
            "fetch": fetch, "compile": compile_source, "validate": validate, "register": register
        }  # fmt: skip
        hooks = {step: self._hook(step) for step in tasks}
        for step, task in tasks.items():
            task.on_completion_hooks.append(hooks[step])
            task.on_failure_hooks.append(hooks[step])
        try:
            yield
        finally:
            for step, task in tasks.items():
                task.on_completion_hooks.remove(hooks[step])
                task.on_failure_hooks.remove(hooks[step])

    def _hook(self, step: str) -> Any:
        def record(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> None:
            self.results.setdefault(step, []).append(state.result(raise_on_failure=False))

        return record

    def write(self, error: CompileflowError | None) -> list[Path]:
        """Write the folder of each step that was on, up to the step that failed.

        Args:
            error: Error of the run; None if it succeeded. An error before all steps is one of the first step.

        Returns:
            The folders that hold something now.

        Raises:
            StoreError: The folder cannot be written, or the store does not answer.
        """
        for step in self._steps:
            values = [value for value in self.results.get(step, ()) if isinstance(value, BaseModel)]
            for value in values:
                self._write(self.folder(step), value)
            if error is not None and (not values or len(values) < len(self.results[step])):
                self._write(self.folder(step), error)
                break
        return [self.folder(step) for step in self._steps if self.folder(step).is_dir()]

    def _write(self, folder: Path, value: BaseModel | CompileflowError) -> None:
        """Write the value of a step, and what a person wants to see of it."""
        name, text, stored_folder = ERROR_FILE, str(value), None
        if isinstance(value, BaseModel):
            text = json.dumps(value.model_dump(mode="json"), indent=1)
        if isinstance(value, FetchedSource):
            name = "source.json"
        elif isinstance(value, CompiledArtifact):
            name, stored_folder = "artifact.json", ("artifact", value.uri)
        elif isinstance(value, ValidatedArtifact):
            name, stored_folder = "verdict.json", ("report", value.report_uri)
        elif isinstance(value, ModelVersion):
            number = len(list(folder.glob("version*.json")))
            name = f"version-{number + 1}.json" if number else "version.json"
        with os_errors(folder, "write to"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text + "\n", "utf-8")
        if stored_folder is not None:
            store_uri, digest = split_uri(stored_folder[1])
            open_store(store_uri, self.settings).get_folder(digest, folder / stored_folder[0])
