"""The work with Neptune's client inside the child: small operations on one project, model or version.

One operation uses a private part of the client: the search for versions of all models in one query.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any, Literal

Kind = Literal["model", "version"]
Value = str | int | float | bool | None
_FIELD_TYPES: dict[type, str] = {str: "String", bool: "Boolean", int: "Integer", float: "Float"}
_STYLES = re.compile(r"\x1b\[[0-9;]*m")
# Errors of this machine's disk, not of the network.
_LOCAL = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EIO,
)


class Session:
    """The client's open objects, for one operation at a time; `opened` counts the objects so far."""

    def __init__(self, on_bytes: Callable[[], None]) -> None:
        import neptune
        from neptune.internal.container_type import ContainerType
        from neptune.metadata_containers.utils import build_raw_query
        from neptune.typing import ProgressBarCallback

        class Progress(ProgressBarCallback):
            """Tells the parent that a download progresses."""

            def update(self, *, by: int, total: int | None = None) -> None:
                on_bytes()

            def __exit__(self, *raised: object) -> None:
                """Let errors pass."""

        self._on_bytes = on_bytes
        self._progress = Progress
        self._neptune = neptune
        self._version_type = ContainerType.MODEL_VERSION
        self._raw_query = build_raw_query
        self._projects: dict[str, Any] = {}
        self._open_object: Any = None
        self._open_key: tuple[str, ...] = ()
        self.opened = 0

    def run(self, operation: str, arguments: Mapping[str, Any]) -> Any:
        """Run one operation. After an error all objects are closed, because their state is unknown."""
        function: Callable[..., Any] = getattr(self, f"do_{operation}")
        try:
            return function(**arguments)
        except BaseException:
            self._projects.clear()
            with suppress(Exception):
                self._release()
            raise

    def describe(self, error: Exception) -> dict[str, Any]:
        """Return an error's kind, its text in one line, and for an unknown project the known ones."""
        kind = kind_of_error(error)
        cause = error.__cause__
        text = type(cause).__name__ if kind == "unavailable" and cause is not None else gist(error)
        return {"kind": kind, "text": text, "choices": self._projects_seen() if kind == "project" else []}

    def do_project_key(self, project: str) -> str:
        """Return the project's key, the first part of every id in it."""
        return str(self._project(project)["sys/id"].fetch())

    def do_find(
        self, project: str, kind: Kind, query: str, columns: list[str], newest: int | None
    ) -> list[dict[str, Value]]:
        """Return the chosen fields of every model or version that the NQL query finds, sorted by id.

        With `newest`, return only that many, newest first.
        """
        from neptune.common.backends.utils import with_api_exceptions_handler

        # The client repeats all other requests by itself when the server fails for a moment.
        find: Callable[..., list[dict[str, Value]]] = with_api_exceptions_handler(self._find)  # type: ignore[no-untyped-call]
        return find(self._project(project), kind, query, columns, newest)

    def _find(
        self, opened: Any, kind: Kind, query: str, columns: list[str], newest: int | None
    ) -> list[dict[str, Value]]:
        # The client can sort an empty project only by id.
        sort_by = "sys/id" if newest is None else "sys/creation_time"
        common = {
            "columns": columns,
            "sort_by": sort_by,
            "ascending": newest is None,
            "limit": newest,
            "progress_bar": False,
        }
        if kind == "model":
            table = opened.fetch_models_table(query=query, **common)
        else:
            # The public method opens every model and sends one query for each.
            table = opened._fetch_entries(
                child_type=self._version_type,
                query=self._raw_query(query=query, trashed=False),
                **common,
            )
        return [{path: _field(row, path) for path in {"sys/id", *columns}} for row in table]

    def do_create_model(self, project: str, key: str, name: str) -> bool:
        """Create a model; return False if its key is taken."""
        from neptune.exceptions import NeptuneModelKeyAlreadyExistsError

        try:
            self._neptune.init_model(project=project, key=key, name=name, mode="sync").stop()
        except NeptuneModelKeyAlreadyExistsError:
            return False
        self.opened += 1
        return True

    def do_create_version(self, project: str, model: str) -> str:
        """Create a model version and return its id; it stays open for the fields that follow."""
        self._release()
        version = self._neptune.init_model_version(project=project, model=model, mode="sync")
        self.opened += 1
        identity = str(version["sys/id"].fetch())
        self._open_object, self._open_key = version, (project, "version", identity, "sync")
        return identity

    def do_write(self, project: str, kind: Kind, identity: str, fields: dict[str, Value]) -> None:
        """Write fields in their order, one or two requests per field; a field of another type is deleted first."""
        target = self._open(project, kind, identity, "sync")
        for path, value in fields.items():
            self._on_bytes()
            if value is not None:
                self._make_room(target, path, _FIELD_TYPES[type(value)])
                target[path] = value

    def do_upload(self, project: str, identity: str, path: str, file: str) -> None:
        """Upload a file as a File field."""
        target = self._open(project, "version", identity, "sync")
        self._make_room(target, path, "File")
        target[path].upload(file)

    def do_stage(self, project: str, identity: str, stage: str) -> None:
        """Change a version's stage."""
        self._open(project, "version", identity, "sync").change_stage(stage)

    def do_trash(self, project: str, identities: list[str]) -> None:
        """Move versions to the project's trash."""
        from neptune.management import trash_objects

        trash_objects(project, identities)

    def do_types(self, project: str, identity: str) -> dict[str, str]:
        """Return the type of every field of a version, for example "File", by its path."""
        version = self._open(project, "version", identity, "read-only")
        version.sync(wait=False)
        return dict(_flat(version.get_structure(), ""))

    def do_fetch(self, project: str, identity: str, path: str) -> Any:
        """Return a field's value, or a namespace's values by name."""
        return _plain(self._open(project, "version", identity, "read-only")[path].fetch())

    def do_extension(self, project: str, identity: str, path: str) -> str:
        """Return the extension of a File field, without the dot."""
        return str(self._open(project, "version", identity, "read-only")[path].fetch_extension() or "")

    def do_tracked_files(self, project: str, identity: str, path: str) -> list[dict[str, str]]:
        """Return path, location and hash of each file that an Artifact field tracks."""
        files = self._open(project, "version", identity, "read-only")[path].fetch_files_list()
        return [
            {
                "path": file.file_path,
                "location": file.metadata.get("location") or file.metadata.get("file_path") or "",
                "etag": file.file_hash,
            }
            for file in files
        ]

    def do_download(self, project: str, identity: str, path: str, dest: str) -> None:
        """Download a File field, or a FileSet as a zip, and report received bytes to the parent."""
        field = self._open(project, "version", identity, "read-only")[path]
        field.download(destination=dest, progress_bar=self._progress)

    def do_release(self, project: str) -> None:
        """Close the open object: Neptune shows an open version as in use."""
        self._release()

    def _release(self) -> None:
        open_object, self._open_object, self._open_key = self._open_object, None, ()
        if open_object is not None:
            open_object.stop()

    def _project(self, name: str) -> Any:
        if name not in self._projects:
            self._projects[name] = self._neptune.init_project(project=name, mode="read-only")
            self.opened += 1
        return self._projects[name]

    def _open(self, project: str, kind: Kind, identity: str, mode: str) -> Any:
        """Open an object; the last one stays open, because calls on one object follow each other."""
        key = (project, kind, identity, mode)
        if key != self._open_key:
            self._release()
            opener = self._neptune.init_model if kind == "model" else self._neptune.init_model_version
            self._open_object, self._open_key = opener(project=project, with_id=identity, mode=mode), key
            self.opened += 1
        return self._open_object

    def _make_room(self, target: Any, path: str, field_type: str) -> None:
        field = target.get_attribute(path) if target.exists(path) else None
        if field is not None and type(field).__name__ != field_type:
            target.pop(path)

    def _projects_seen(self) -> list[str]:
        from neptune.management import get_project_list

        try:
            return list(get_project_list())
        except Exception:  # noqa: BLE001 - the list is only a hint; the error itself is reported
            return []


def kind_of_error(error: BaseException) -> str:
    """Return the kind of a client's error: unavailable, token, forbidden, project, absent, local or refused."""
    import requests
    from bravado.exception import BravadoConnectionError, BravadoTimeoutError, HTTPServerError
    from neptune.common import exceptions as common
    from neptune.exceptions import CannotResolveHostname, MetadataContainerNotFound, ProjectNotFound

    kinds: tuple[tuple[str, tuple[type[BaseException], ...]], ...] = (
        ("token", (common.Unauthorized, common.NeptuneInvalidApiTokenException)),
        ("forbidden", (common.Forbidden,)),
        ("project", (ProjectNotFound,)),
        ("absent", (MetadataContainerNotFound,)),
        (
            "unavailable",
            (
                common.NeptuneConnectionLostException, common.InternalServerError, CannotResolveHostname,
                BravadoConnectionError, BravadoTimeoutError, HTTPServerError,
                requests.exceptions.ConnectionError, requests.exceptions.Timeout,
                requests.exceptions.ChunkedEncodingError, OSError,
            ),
        ),
    )  # fmt: skip
    # Errors of requests are OSErrors without a number.
    if isinstance(error, OSError) and error.errno in _LOCAL:
        return "local"
    return next((kind for kind, classes in kinds if isinstance(error, classes)), "refused")


def gist(error: BaseException) -> str:
    """Return the first two lines with text: the client's errors are a page long."""
    lines = [line.strip() for line in _STYLES.sub("", str(error)).splitlines()]
    text = " ".join([line for line in lines if line and not line.startswith("---")][:2])
    return f"{type(error).__name__}: {text[:300]}".rstrip(".: ")


def _field(row: Any, path: str) -> Value:
    try:
        return _value(row[path].get())
    except ValueError:
        return None


def _value(value: Any) -> Value:
    if isinstance(value, datetime):
        return value.isoformat()
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    return _value(value)


def _flat(structure: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, str]]:
    for name, inner in structure.items():
        if isinstance(inner, Mapping):
            yield from _flat(inner, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", type(inner).__name__
