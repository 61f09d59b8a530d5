"""A session of the real client with a server, in one process because importing the client takes seconds.

`python -m tests.services.neptune_session PROJECT FOLDER` writes its observations to FOLDER/observations.json. When
the test has to do something meanwhile, the session prints a line and waits for a line.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import json
import logging
import os
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Observations = dict[str, Any]
MOMENT = dt.datetime(2026, 3, 5, 12, 30, tzinfo=dt.UTC)
SMALL_BYTES = 100_000
LARGE_BYTES = 20_000_000
HUGE_BYTES = 200_000_000


def main(project: str, folder: Path) -> None:
    """Run all parts of the session."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    import neptune

    observations: Observations = {}
    model = neptune.init_model(key="KEY", name="a model", project=project, mode="sync")
    model_id = model["sys/id"].fetch()

    def create_version() -> Any:
        return neptune.init_model_version(model=model_id, project=project, mode="sync")

    observations["collision"] = error_of(lambda: neptune.init_model(key="KEY", project=project, mode="sync"))
    version = create_version()
    observations["ids"] = [model_id, version["sys/id"].fetch()]
    observations["fields"] = fields(version)
    observations["series"] = series(version)
    observations["stages"] = stages(version)
    observations["files"] = files(version, folder)
    observations["sets"] = file_sets(version, folder)
    observations["tracked"] = tracked(version, folder)
    observations["table"] = table(model, create_version)
    observations["restart"] = upload_over_a_restart(version, folder)
    observations["trash"] = trash(project, model, create_version)
    observations["projects"] = projects(project)
    observations["wrong token"] = error_of(
        lambda: neptune.init_model(key="X", project=project, mode="sync", api_token=os.environ["WRONG_TOKEN"])
    )
    observations["plain http"] = over_plain_http(project)
    version.stop()
    model.stop()
    (folder / "observations.json").write_text(json.dumps(observations), "utf-8")


def fields(version: Any) -> Observations:
    """Write a field of each type, change some, delete one, and read all."""
    values = {"string": "text", "long": "é" * 20_000, "float": 0.5, "int": 3, "bool": True, "time": MOMENT}
    for name, value in values.items():
        version[f"fields/{name}"] = value
    version["fields/nan"] = float("nan")
    version["fields/deleted"] = 1
    version["fields/string"] = "other text"
    del version["fields/deleted"]
    version["sys/tags"].add(["one", "two", "three"])
    version["sys/tags"].remove("two")
    version.sync()
    namespace: Observations = version["fields"].fetch()
    short_names = ("string", "float", "int", "bool")
    return {
        **{name: namespace[name] for name in short_names},
        "time": namespace["time"].isoformat(),
        "long": len(namespace["long"]),
        "names": sorted(namespace),
        "one by one": [version[f"fields/{name}"].fetch() == namespace[name] for name in (*short_names, "time")],
        "tags": sorted(version["sys/tags"].fetch()),
        "other type": error_of(lambda: version["fields/float"].upload(__file__)),
        "absent": error_of(lambda: version["sys/nothing"].fetch()),
    }


def series(version: Any) -> Observations:
    """Log numbers and strings."""
    version["series/loss"].extend([1.0, 0.5, 0.25])
    version["series/loss"].append(0.125, step=10)
    version["series/text"].append("a line")
    values = version["series/loss"].fetch_values(include_timestamp=False, progress_bar=False)
    return {
        "last": version["series/loss"].fetch_last(),
        "steps": values["step"].tolist(),
        "values": values["value"].tolist(),
        "text": version["series/text"].fetch_values(progress_bar=False)["value"].tolist(),
        "last text": version["series/text"].fetch_last(),
    }


def stages(version: Any) -> Observations:
    """Change the stage, with its method and as a field."""
    before = version["sys/stage"].fetch()
    version.change_stage("production")
    return {
        "before": before,
        "after": version["sys/stage"].fetch(),
        "unknown": error_of(lambda: version["sys/stage"].assign("live")),
        "read-only": error_of(lambda: version["sys/id"].assign("X-1")),
    }


def files(version: Any, folder: Path) -> Observations:
    """Upload files whole and in parts, and download them again."""
    sizes = {"empty": 0, "small": SMALL_BYTES, "large": LARGE_BYTES, "huge": HUGE_BYTES}
    equal = {}
    for name, size in sizes.items():
        path = fill(folder / f"{name}.bin", size)
        version[f"files/{name}"].upload(str(path), wait=True)
        target = folder / f"{name}.back"
        version[f"files/{name}"].download(str(target), progress_bar=False)
        equal[name] = digest(target) == digest(path)
        target.unlink()
    # The second file replaces the first.
    version["files/small"].upload(str(fill(folder / "small.bin", 10)), wait=True)
    version["files/small"].download(str(folder / "replaced"), progress_bar=False)
    return {
        "equal": equal,
        "replaced": (folder / "replaced").stat().st_size,
        "extension": version["files/small"].fetch_extension(),
    }


def file_sets(version: Any, folder: Path) -> Observations:
    """Upload a large file of a set, which comes in parts, small files, which come in a tar, and a single file."""
    weights = folder / "weights"
    (weights / "sub").mkdir(parents=True)
    fill(weights / "model.bin", LARGE_BYTES)
    (weights / "config.json").write_text("{}")
    (weights / "sub" / "vocabulary.txt").write_text("a\nb\n")
    version["set"].upload_files(f"{weights}/**/*.*", wait=True)
    version["small set"].upload_files([str(weights / "config.json"), str(weights / "sub" / "*.txt")], wait=True)
    version["single"].upload_files(str(weights / "config.json"), wait=True)
    bodies = unzipped(version, folder)
    version["set"].delete_files(["sub/vocabulary.txt"], wait=True)
    return {
        "equal": {
            name: hashlib.sha256(body).hexdigest() == digest(weights / name) for name, body in bodies.items()
        },
        "entries": [[entry.name, entry.size, entry.file_type] for entry in version["set"].list_fileset_files()],
        "after deletion": sorted(unzipped(version, folder)),
        "small": [entry.name for entry in version["small set"].list_fileset_files("sub")],
        "single file": [entry.name for entry in version["single"].list_fileset_files()],
        "absent": error_of(lambda: version["files/nothing"].download(str(folder / "x"))),
    }


def tracked(version: Any, folder: Path) -> list[str]:
    """Track a file that stays where it is, then the files of a folder."""
    version["tracked"].track_files(str(folder / "weights" / "config.json"))
    version["tracked"].track_files(str(folder / "weights" / "sub"))
    return sorted(file.file_path for file in version["tracked"].fetch_files_list())


def table(model: Any, create_version: Callable[[], Any]) -> Observations:
    """Fetch tables: with a query, sorted, in pages."""
    for number in range(6):
        version = create_version()
        version["score"] = number / 10
        version["registry/digest"] = f"sha256:{number}"
        version.stop()

    def ids(query: str, **options: Any) -> list[str]:
        rows = model.fetch_model_versions_table(query=query, progress_bar=False, **options).to_rows()
        return [row["sys/id"].get().rpartition("-")[2] for row in rows]

    return {
        "all": ids(""),
        "digest": ids('(`registry/digest`:string = "sha256:3")'),
        "greater": ids("(`score`:float >= 0.2) AND NOT (`score`:float = 0.4)", sort_by="score", ascending=True),
        "limit": ids("`score`:float > 0", sort_by="score", limit=2),
        "pages": ids("", sort_by="sys/id", ascending=True, columns=["score"]),
        "syntax": error_of(lambda: ids("(`score`:float >")),
        "column": error_of(lambda: ids("", sort_by="no/such")),
    }


def upload_over_a_restart(version: Any, folder: Path) -> bool:
    """Upload a file in parts while the test restarts the server between two parts."""
    from neptune.common.storage.datastream import FileChunker

    generate = FileChunker.generate

    def generate_and_wait(self: Any) -> Iterator[Any]:
        for number, chunk in enumerate(generate(self)):
            if number == 1:
                ask("restart")
            yield chunk

    FileChunker.generate = generate_and_wait
    try:
        version["files/restarted"].upload(str(folder / "large.bin"), wait=True)
    finally:
        FileChunker.generate = generate
    version["files/restarted"].download(str(folder / "restarted"), progress_bar=False)
    return digest(folder / "restarted") == digest(folder / "large.bin")


def trash(project: str, model: Any, create_version: Callable[[], Any]) -> Observations:
    """Move a version to the trash, then delete it."""
    from neptune import init_model_version, management

    version = create_version()
    identifier = version["sys/id"].fetch()
    version.stop()

    def is_listed() -> bool:
        query = f'(`sys/id`:string = "{identifier}")'
        return bool(model.fetch_model_versions_table(query=query, progress_bar=False).to_rows())

    def error_of_opening() -> str:
        return error_of(lambda: init_model_version(with_id=identifier, project=project, mode="read-only").stop())

    observations: Observations = {"before": is_listed()}
    management.delete_objects_from_trash(project, identifier)
    observations["not in the trash"] = error_of_opening()
    management.trash_objects(project, identifier)
    observations |= {"trashed": is_listed(), "in the trash": error_of_opening()}
    management.clear_trash(project)
    observations["deleted"] = error_of_opening()
    next_version = create_version()
    observations["number is reused"] = next_version["sys/id"].fetch() == identifier
    next_version.stop()
    return observations


def projects(project: str) -> Observations:
    """Create a project, and open one that does not exist."""
    import neptune
    from neptune import management

    workspace = project.partition("/")[0]
    name = f"{project}-new"
    created_name = management.create_project(name, key="NEW")
    return {
        "created": created_name == name and name in management.get_project_list(),
        "unknown": error_of(lambda: neptune.init_model(key="X", project=f"{workspace}/nothing", mode="sync")),
        "model key": error_of(lambda: neptune.init_model(key="lower case", project=project, mode="sync")),
    }


def over_plain_http(project: str) -> list[str]:
    """Connect at an address that has no session yet, without permission to use plain http, then with it."""
    import neptune

    token = os.environ["OTHER_ADDRESS_TOKEN"]

    def connect() -> None:
        neptune.init_project(project=project, mode="read-only", api_token=token).stop()

    del os.environ["OAUTHLIB_INSECURE_TRANSPORT"]
    error = error_of(connect)
    os.environ["OAUTHLIB_INSECURE_TRANSPORT"] = "1"
    return [error, error_of(connect)]


def ask(action: str) -> None:
    """Ask the test for an action, and wait until it is done."""
    sys.stdout.write(f"{action}\n")
    sys.stdout.flush()
    sys.stdin.readline()


def error_of(action: Callable[[], object]) -> str:
    """Return the name of the error that an action raises, or an empty string if it raises none."""
    with contextlib.redirect_stderr(None):
        try:
            action()
        except Exception as error:  # noqa: BLE001 - the test checks the kind
            return type(error).__name__
    return ""


def unzipped(version: Any, folder: Path) -> dict[str, bytes]:
    """Download the file set and return its files."""
    path = folder / "set.zip"
    version["set"].download(str(path), progress_bar=False)
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def fill(path: Path, size: int) -> Path:
    """Write `size` bytes in which every megabyte is different."""
    with path.open("wb") as file:
        for start in range(0, size, 1_000_000):
            file.write(hashlib.sha256(f"{path}{start}".encode()).digest() * 31_250)
        file.truncate(size)
    return path


def digest(path: Path) -> str:
    """Return a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
