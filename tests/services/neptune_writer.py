"""The real Neptune client in a separate process, used as other teams use it, without compileflow."""

from __future__ import annotations

import json
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# Importing the grammar takes half of the time of the import, and nothing uses it.
_PROGRAM = (
    "import sys; sys.modules['rfc3987_syntax'] = None; from tests.services.neptune_writer import main; main()"
)
ROOT = Path(__file__).parents[2]


class NeptuneWriter:
    """Calls functions of this module in the other process."""

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
        response = json.loads(self._popen.stdout.readline() or '{"error": "the process ended"}')
        assert "error" not in response, response["error"]
        return response["value"]

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
    """Run such a process until the block ends."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = NeptuneWriter(environment, folder)
    try:
        yield writer
    finally:
        writer.close()


def make_version(
    project: str, key: str, fields: dict[str, Any], files: dict[str, str], sets: dict[str, str]
) -> str:
    """Create a version of a model, and the model unless it exists; return the id of the version.

    Args:
        project: Name of the project, as workspace/project.
        key: Key of the model.
        fields: Values by path of the field.
        files: Files to upload, by path of the field.
        sets: Globs of the files to upload as a file set, by path of the field.
    """
    import neptune
    from neptune.exceptions import NeptuneModelKeyAlreadyExistsError

    with suppress(NeptuneModelKeyAlreadyExistsError):
        neptune.init_model(project=project, key=key, mode="sync").stop()
    with neptune.init_project(project=project, mode="read-only") as container:
        model = f"{container['sys/id'].fetch()}-{key}"
    with neptune.init_model_version(project=project, model=model, mode="sync") as version:
        identity = version["sys/id"].fetch()
        write(version, fields, files, sets)
    return str(identity)


def change_version(project: str, identity: str, fields: dict[str, Any], files: dict[str, str]) -> None:
    """Write fields and files of a version."""
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


def track(project: str, identity: str, locations: dict[str, str], endpoint: str) -> None:
    """Track files in S3, at `endpoint`, by path of the field."""
    import os

    import neptune

    os.environ |= {
        "S3_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with neptune.init_model_version(project=project, with_id=identity, mode="sync") as version:
        for path, location in locations.items():
            version[path].track_files(location)


def read_version(project: str, identity: str) -> dict[str, Any]:
    """Return the values of a version, nested like their paths."""
    import neptune

    with neptune.init_model_version(project=project, with_id=identity, mode="read-only") as version:
        return json.loads(json.dumps(version.fetch(), default=str))


def download(project: str, identity: str, path: str, out: str) -> None:
    """Write the bytes of a File field to `out`."""
    import neptune

    with neptune.init_model_version(project=project, with_id=identity, mode="read-only") as version:
        version[path].download(out)


def list_versions(project: str) -> dict[str, bool]:
    """Return for each version that is not in the trash, by its id, whether it is complete."""
    import neptune

    complete = {}
    with neptune.init_project(project=project, mode="read-only") as container:
        models = [
            row["sys/id"].get() for row in container.fetch_models_table(sort_by="sys/id", progress_bar=False)
        ]
    for identity in models:
        with neptune.init_model(project=project, with_id=identity, mode="read-only") as model:
            columns = ["sys/id", "registry/complete"]
            for row in model.fetch_model_versions_table(columns=columns, sort_by="sys/id", progress_bar=False):
                try:
                    complete[row["sys/id"].get()] = bool(row["registry/complete"].get())
                except ValueError:
                    complete[row["sys/id"].get()] = False
    return complete


def main() -> None:
    """Run the other process: read calls from standard input and write their results to standard output."""
    import os

    responses = os.fdopen(os.dup(1), "w", buffering=1)
    # The client prints to standard output; send that to standard error.
    os.dup2(2, 1)
    for line in sys.stdin:
        function, arguments = json.loads(line)
        try:
            response = {"value": globals()[function](*arguments)}
        except Exception:  # noqa: BLE001 - the test shows the traceback
            response = {"error": traceback.format_exc()}
        responses.write(json.dumps(response) + "\n")
