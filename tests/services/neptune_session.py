"""What the real client does with a server, all in one process since importing it takes seconds.

`python -m tests.services.neptune_session PROJECT FOLDER` writes what it saw to FOLDER/seen.json, and prints a line
and waits for one whenever the test has to do something meanwhile.
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

Seen = dict[str, Any]
MOMENT = dt.datetime(2026, 3, 5, 12, 30, tzinfo=dt.UTC)
SMALL_BYTES = 100_000
LARGE_BYTES = 20_000_000
HUGE_BYTES = 200_000_000


def main(project: str, folder: Path) -> None:
    """Run every scene."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    import neptune

    seen: Seen = {}
    model = neptune.init_model(key="KEY", name="a model", project=project, mode="sync")
    model_id = model["sys/id"].fetch()

    def make() -> Any:
        return neptune.init_model_version(model=model_id, project=project, mode="sync")

    seen["collision"] = error_of(lambda: neptune.init_model(key="KEY", project=project, mode="sync"))
    version = make()
    seen["ids"] = [model_id, version["sys/id"].fetch()]
    seen["fields"] = fields(version)
    seen["series"] = series(version)
    seen["stages"] = stages(version)
    seen["files"] = files(version, folder)
    seen["sets"] = file_sets(version, folder)
    seen["tracked"] = tracked(version, folder)
    seen["table"] = table(model, make)
    seen["restart"] = upload_over_a_restart(version, folder)
    seen["trash"] = trash(project, model, make)
    seen["projects"] = projects(project)
    seen["wrong token"] = error_of(
        lambda: neptune.init_model(key="X", project=project, mode="sync", api_token=os.environ["WRONG_TOKEN"])
    )
    seen["plain http"] = over_plain_http(project)
    version.stop()
    model.stop()
    (folder / "seen.json").write_text(json.dumps(seen), "utf-8")


def fields(version: Any) -> Seen:
    """Write each type of field, change some, delete one."""
    given = {"string": "text", "long": "é" * 20_000, "float": 0.5, "int": 3, "bool": True, "time": MOMENT}
    for name, value in given.items():
        version[f"fields/{name}"] = value
    version["fields/nan"] = float("nan")
    version["fields/gone"] = 1
    version["fields/string"] = "other text"
    del version["fields/gone"]
    version["sys/tags"].add(["one", "two", "three"])
    version["sys/tags"].remove("two")
    version.sync()
    found: Seen = version["fields"].fetch()
    return {
        **{name: found[name] for name in ("string", "float", "int", "bool")},
        "time": found["time"].isoformat(),
        "long": len(found["long"]),
        "names": sorted(found),
        "tags": sorted(version["sys/tags"].fetch()),
        "other type": error_of(lambda: version["fields/float"].upload(__file__)),
        "absent": error_of(lambda: version["sys/nothing"].fetch()),
    }


def series(version: Any) -> Seen:
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
    }


def stages(version: Any) -> Seen:
    """Change the stage, by its call and past it."""
    before = version["sys/stage"].fetch()
    version.change_stage("production")
    return {
        "before": before,
        "after": version["sys/stage"].fetch(),
        "unknown": error_of(lambda: version["sys/stage"].assign("live")),
        "own": error_of(lambda: version["sys/id"].assign("X-1")),
    }


def files(version: Any, folder: Path) -> Seen:
    """Upload files whole and in parts, download them again."""
    sizes = {"empty": 0, "small": SMALL_BYTES, "large": LARGE_BYTES, "huge": HUGE_BYTES}
    same = {}
    for name, size in sizes.items():
        path = fill(folder / f"{name}.bin", size)
        version[f"files/{name}"].upload(str(path), wait=True)
        target = folder / f"{name}.back"
        version[f"files/{name}"].download(str(target), progress_bar=False)
        same[name] = digest(target) == digest(path)
        target.unlink()
    # The same field again: the newer file counts.
    version["files/small"].upload(str(fill(folder / "small.bin", 10)), wait=True)
    version["files/small"].download(str(folder / "again"), progress_bar=False)
    return {"same": same, "again": (folder / "again").stat().st_size}


def file_sets(version: Any, folder: Path) -> Seen:
    """Upload a folder: small files, which come as one tar, and a large one, which comes in parts."""
    weights = folder / "weights"
    (weights / "sub").mkdir(parents=True)
    fill(weights / "model.bin", LARGE_BYTES)
    (weights / "config.json").write_text("{}")
    (weights / "sub" / "vocabulary.txt").write_text("a\nb\n")
    version["set"].upload_files(f"{weights}/**/*.*", wait=True)
    found = unzipped(version, folder)
    version["set"].delete_files(["sub/vocabulary.txt"], wait=True)
    return {
        "same": {name: hashlib.sha256(body).hexdigest() == digest(weights / name) for name, body in found.items()},
        "entries": [[one.name, one.size, one.file_type] for one in version["set"].list_fileset_files()],
        "after": sorted(unzipped(version, folder)),
        "absent": error_of(lambda: version["files/nothing"].download(str(folder / "x"))),
    }


def tracked(version: Any, folder: Path) -> list[str]:
    """Track files that stay where they are, and one more."""
    version["tracked"].track_files(str(folder / "weights" / "config.json"))
    version["tracked"].track_files(str(folder / "weights" / "sub"))
    return sorted(one.file_path for one in version["tracked"].fetch_files_list())


def table(model: Any, make: Callable[[], Any]) -> Seen:
    """Ask for tables: with a query, sorted, in pages."""
    for number in range(6):
        made = make()
        made["score"] = number / 10
        made["registry/digest"] = f"sha256:{number}"
        made.stop()

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
    """Upload in parts while the test restarts the server between two of them."""
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


def trash(project: str, model: Any, make: Callable[[], Any]) -> Seen:
    """Trash a version, then delete it for good."""
    from neptune import init_model_version, management

    made = make()
    identifier = made["sys/id"].fetch()
    made.stop()

    def found() -> bool:
        query = f'(`sys/id`:string = "{identifier}")'
        return bool(model.fetch_model_versions_table(query=query, progress_bar=False).to_rows())

    def there() -> str:
        return error_of(lambda: init_model_version(with_id=identifier, project=project, mode="read-only").stop())

    seen: Seen = {"before": found()}
    management.delete_objects_from_trash(project, identifier)
    seen["not in the trash"] = there()
    management.trash_objects(project, identifier)
    seen |= {"trashed": found(), "in the trash": there()}
    management.clear_trash(project)
    seen["deleted"] = there()
    newer = make()
    seen["number comes again"] = newer["sys/id"].fetch() == identifier
    newer.stop()
    return seen


def projects(project: str) -> Seen:
    """Make a project, look for one that is not there."""
    import neptune
    from neptune import management

    workspace = project.partition("/")[0]
    name = f"{project}-made"
    made = management.create_project(name, key="MADE")
    return {
        "made": made == name and name in management.get_project_list(),
        "unknown": error_of(lambda: neptune.init_model(key="X", project=f"{workspace}/nothing", mode="sync")),
        "model key": error_of(lambda: neptune.init_model(key="lower case", project=project, mode="sync")),
    }


def over_plain_http(project: str) -> list[str]:
    """Connect at an address with which there is no session yet, without leave to use plain http, then with it."""
    import neptune

    token = os.environ["OTHER_ADDRESS_TOKEN"]

    def connect() -> None:
        neptune.init_project(project=project, mode="read-only", api_token=token).stop()

    del os.environ["OAUTHLIB_INSECURE_TRANSPORT"]
    without = error_of(connect)
    os.environ["OAUTHLIB_INSECURE_TRANSPORT"] = "1"
    return [without, error_of(connect)]


def ask(what: str) -> None:
    """Let the test do something, and wait until it is done."""
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()
    sys.stdin.readline()


def error_of(action: Callable[[], object]) -> str:
    """Return the name of the error that a call raises; empty when it raises none."""
    with contextlib.redirect_stderr(None):
        try:
            action()
        except Exception as error:  # noqa: BLE001 - which one it is, is the question
            return type(error).__name__
    return ""


def unzipped(version: Any, folder: Path) -> dict[str, bytes]:
    """Download the file set and return its files."""
    path = folder / "set.zip"
    version["set"].download(str(path), progress_bar=False)
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def fill(path: Path, size: int) -> Path:
    """Write `size` bytes of which no two megabytes are alike."""
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
