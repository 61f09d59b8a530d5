"""The real Neptune client in a process of its own, as other teams use it, with nothing of compileflow."""

from __future__ import annotations

import json
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# The grammar is half of the import's time, and never used.
_PROGRAM = (
    "import sys; sys.modules['rfc3987_syntax'] = None; from tests.services.neptune_writer import main; main()"
)
ROOT = Path(__file__).parents[2]


class NeptuneWriter:
    """Calls functions of this module in the other process, one at a time."""

    def __init__(self, environment: Mapping[str, str], folder: Path):
        self._folder = folder
        self._log = (folder / "neptune-writer.log").open("wb")
        self._popen = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            cwd=ROOT,
            env={**environment, "NEPTUNE_DATA_DIRECTORY": str(folder / "neptune"), "PATH": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def __call__(self, function: str, *arguments: Any) -> Any:
        """Call a function of this module and return its value."""
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._popen.stdin.write(json.dumps([function, arguments]) + "\n")
        self._popen.stdin.flush()
        answer = json.loads(self._popen.stdout.readline() or '{"error": "the process ended"}')
        assert "error" not in answer, answer["error"]
        return answer["value"]

    def file(self, project: str, identity: str, path: str) -> bytes:
        """Return the bytes of a File field."""
        out = self._folder / "downloaded"
        self("download", project, identity, path, str(out))
        return out.read_bytes()

    def close(self) -> None:
        """End the process."""
        self._popen.kill()
        self._popen.communicate()
        self._log.close()


@contextmanager
def neptune_writer(environment: Mapping[str, str], folder: Path) -> Iterator[NeptuneWriter]:
    """Give such a process until the block ends."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = NeptuneWriter(environment, folder)
    try:
        yield writer
    finally:
        writer.close()


def make_version(
    project: str, key: str, fields: dict[str, Any], files: dict[str, str], sets: dict[str, str]
) -> str:
    """Make a version of a model, which is made when absent, and return its id.

    Args:
        project: As workspace/project.
        key: Of the model.
        fields: Values by attribute path.
        files: Files to upload by attribute path.
        sets: Globs of files to upload as a file set by attribute path.
    """
    import neptune
    from neptune.exceptions import NeptuneModelKeyAlreadyExistsError

    with suppress(NeptuneModelKeyAlreadyExistsError):
        neptune.init_model(project=project, key=key, mode="sync").stop()
    with neptune.init_project(project=project, mode="read-only") as opened:
        model = f"{opened['sys/id'].fetch()}-{key}"
    with neptune.init_model_version(project=project, model=model, mode="sync") as version:
        identity = version["sys/id"].fetch()
        write(version, fields, files, sets)
    return str(identity)


def change_version(project: str, identity: str, fields: dict[str, Any], files: dict[str, str]) -> None:
    """Write to a version."""
    import neptune

    with neptune.init_model_version(project=project, with_id=identity, mode="sync") as version:
        write(version, fields, files, {})


def write(version: Any, fields: dict[str, Any], files: dict[str, str], sets: dict[str, str]) -> None:
    for path, value in fields.items():
        if path == "sys/stage":
            version.change_stage(value)
        else:
            version[path] = value
    for path, file in files.items():
        version[path].upload(file)
    for path, pattern in sets.items():
        version[path].upload_files(pattern)


def read_version(project: str, identity: str) -> dict[str, Any]:
    """Return a version's values, nested by its paths."""
    import neptune

    with neptune.init_model_version(project=project, with_id=identity, mode="read-only") as version:
        return json.loads(json.dumps(version.fetch(), default=str))


def download(project: str, identity: str, path: str, out: str) -> None:
    """Write the bytes of a File field to `out`."""
    import neptune

    with neptune.init_model_version(project=project, with_id=identity, mode="read-only") as version:
        version[path].download(out)


def list_versions(project: str) -> dict[str, bool]:
    """Return the ids of all versions that are not in the trash, and whether each is complete."""
    import neptune

    found = {}
    with neptune.init_project(project=project, mode="read-only") as opened:
        models = [row["sys/id"].get() for row in opened.fetch_models_table(sort_by="sys/id", progress_bar=False)]
    for identity in models:
        with neptune.init_model(project=project, with_id=identity, mode="read-only") as model:
            columns = ["sys/id", "registry/complete"]
            for row in model.fetch_model_versions_table(columns=columns, sort_by="sys/id", progress_bar=False):
                try:
                    found[row["sys/id"].get()] = bool(row["registry/complete"].get())
                except ValueError:
                    found[row["sys/id"].get()] = False
    return found


def main() -> None:
    """Entry of the other process."""
    import os

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    # The client prints to standard output.
    os.dup2(2, 1)
    for line in sys.stdin:
        function, arguments = json.loads(line)
        try:
            answer = {"value": globals()[function](*arguments)}
        except Exception:  # noqa: BLE001 - the test shows it
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
