"""neptune: a model version on a Neptune server, in the layout of teams that register with Neptune's client.

The version's card, `model/model_card`, names the task, the attribute path of the model's files, and the test
files. The model's files are a file set at that path, or single files below it, uploaded or tracked in S3. If a
version holds several models, each in its own folder, neptune://workspace/project/ID#FOLDER chooses one. The source
only reads.
"""

from __future__ import annotations

import shutil
import struct
import zlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any
from zipfile import BadZipFile, ZipFile

from compileflow._process.folders import os_errors
from compileflow.contracts import LocatedSource, SourceVersion
from compileflow.contracts.digests import safe_relative_path
from compileflow.contracts.sources import TEST_FILES
from compileflow.errors import SourceError, SourceUnavailableError, SpecError, first_line
from compileflow.registries.neptune.address import parse_project, parse_version, read_token
from compileflow.registries.neptune.calls import NeptuneClient
from compileflow.registries.neptune.fields import DIGEST
from compileflow.settings import Settings
from compileflow.sources.files import card_task, choose_files_below, folder_names, model_folder, read_json
from compileflow.sources.tracked_files import SCHEME, TrackedFile, download_tracked, objects_at

_CARD = "model/model_card"
# The card names test files without their extension.
_TEST_KINDS = tuple(name.removesuffix(".json") for name in TEST_FILES)
# zipfile raises these for an archive that is damaged or encrypted, or contains a name twice.
_BROKEN = (
    BadZipFile, FileExistsError, NotADirectoryError, EOFError, zlib.error, RuntimeError, struct.error, ValueError,
)  # fmt: skip


class NeptuneSource:
    """Downloads the files that a version's card names. They may be replaced at any time, so it has no revision."""

    def __init__(self, settings: Settings):
        self._settings = settings

    def check(self, location: str, revision: str | None) -> None:
        """Refuse a wrong location, and a missing or wrong token. No request is sent.

        Raises:
            SourceError: The location does not name a version, a revision was given, or a usable token is missing.
        """
        self._parse(location, revision)
        read_token(self._settings, refused=SourceError)

    def pin(self, location: str, revision: str | None) -> tuple[str, str | None]:
        """Ask for the complete id of the version, without a commit.

        Raises:
            SourceError: The version does not exist, or a revision was given.
            SourceUnavailableError: The server did not answer.
        """
        client, identity, model_name = self._open(location, revision)
        return _uri(client, identity, model_name), None

    def versions(self, place: str) -> list[SourceVersion]:
        """Return the versions of a project that compileflow did not register, named by their model's id.

        Raises:
            SourceError: The URI is wrong, or the server refused.
            SourceUnavailableError: The server did not answer.
        """
        try:
            project = parse_project(place)
        except SpecError as error:
            raise SourceError(error.message, hint=error.hint) from error
        client = NeptuneClient(project, self._settings, refused=SourceError, unavailable=SourceUnavailableError)
        rows = client.find("version", "", ["sys/creation_time", "sys/model_id", DIGEST])
        return [
            SourceVersion(
                model=_uri(client, str(row["sys/id"]), ""),
                uri=_uri(client, str(row["sys/id"]), ""),
                name=str(row["sys/model_id"]),
                created_at=datetime.fromisoformat(str(row["sys/creation_time"])).astimezone(UTC).isoformat(),
            )
            for row in rows
            if row[DIGEST] is None
        ]

    def locate(self, location: str, revision: str | None, work_dir: Path) -> LocatedSource:
        """Download the model's files and the test files to `work_dir`.

        Raises:
            SourceError: The version has no card, or lacks a file that its card names.
            SourceUnavailableError: The server did not answer.
        """
        client, identity, model_name = self._open(location, revision)
        with os_errors(work_dir, "download to"):
            work_dir.mkdir(parents=True, exist_ok=True)
            version = _Version(client, identity, model_name, work_dir, self._settings)
            card = version.card()
            folder = model_folder(version.model(card, work_dir / "model"))
            test_files = version.test_files(card, work_dir / "test_files")
        client.release()
        return LocatedSource(
            uri=version.uri,
            revision="",
            folder=folder,
            files=choose_files_below(folder, version.uri),
            hf_task=card_task(card, version.uri),
            test_files=test_files,
        )

    def _open(self, location: str, revision: str | None) -> tuple[NeptuneClient, str, str]:
        project, text, model_name = self._parse(location, revision)
        client = NeptuneClient(project, self._settings, refused=SourceError, unavailable=SourceUnavailableError)
        return client, client.version_id(text), model_name

    def _parse(self, location: str, revision: str | None) -> tuple[str, str, str]:
        """Return the project, the text that names the version, and the name of its model or ""."""
        if revision is not None:
            raise SourceError(
                f"{location} is a model version, and a model version has no revision {revision!r}.",
                hint="Leave the revision empty; the id identifies the version.",
            )
        uri, _, model_name = location.partition("#")
        try:
            project, text = parse_version(uri)
        except SpecError as error:
            raise SourceError(error.message, hint=error.hint) from error
        return project, text, model_name


def _uri(client: NeptuneClient, identity: str, model_name: str) -> str:
    return f"neptune://{client.project}/{identity}" + (f"#{model_name}" if model_name else "")


class _Version:
    """One model version, the name of its model if it holds several, and the folder of its downloads."""

    def __init__(self, client: NeptuneClient, identity: str, model_name: str, work_dir: Path, settings: Settings):
        self.uri = _uri(client, identity, model_name)
        self._client = client
        self._identity = identity
        self._model_name = model_name
        self._work_dir = work_dir
        self._settings = settings
        self._types: Mapping[str, str] = client.types(identity)
        self._is_one_of_several = False

    def card(self) -> dict[str, Any]:
        """Return the model card; it may be a JSON file or a string."""
        card = self._json(_CARD, "model card", "", self._work_dir / "model_card.json")
        if not isinstance(card, dict):
            raise SourceError(f"{_CARD} of {self.uri} is not a JSON object.", hint="Upload it as a JSON object.")
        return card

    def model(self, card: Mapping[str, Any], dest: Path) -> Path:
        """Download the files at the card's attribute path."""
        root = card.get("model_artifact_attribute_path")
        if not isinstance(root, str) or not root.strip("/"):
            raise SourceError(
                f"The card of {self.uri} does not name a model_artifact_attribute_path.",
                hint="Add the attribute path of the model's files to the card.",
            )
        root = root.strip("/")
        field_types = {
            path: kind for path, kind in self._types.items() if path == root or path.startswith(f"{root}/")
        }
        files = {
            path: kind
            for path, kind in field_types.items()
            if kind in ("File", "FileSet") or self._is_tracked(path)
        }
        if not files or files.get(root) == "File":
            raise SourceError(
                f"{self.uri} has no files at {root!r}, the path of the model in its card.",
                hint=f"Upload the folder of save_pretrained there. Fields: {_summary(field_types) or 'none'}.",
            )
        dest.mkdir()
        chosen_folder = self._choose_model(folder_names([path[len(root) + 1 :] for path in files]))
        tracked: list[tuple[TrackedFile, Path]] = []
        for path, kind in files.items():
            relative = path[len(root) + 1 :]
            if relative and chosen_folder and not relative.startswith(f"{chosen_folder}/"):
                continue
            if kind == "FileSet":
                self._unpack(path, _below(dest, relative, self.uri) if relative else dest)
            elif kind != "File":
                tracked += self._tracked(path, relative, dest)
            else:
                self._download(path, _below(dest, self._with_extension(path, relative), self.uri))
        download_tracked(tracked, self._settings, self.uri)
        # A file set or a tracked folder shows its folders only now.
        names = folder_names([file.relative_to(dest).as_posix() for file in dest.rglob("*") if file.is_file()])
        chosen_folder = chosen_folder or self._choose_model(names)
        if self._model_name and not chosen_folder:
            raise SourceError(
                f"{self.uri} does not exist: the version holds one model, which has no name.",
                hint=f"Leave the name out: {self.uri.partition('#')[0]}.",
            )
        return dest / chosen_folder if chosen_folder else dest

    def _choose_model(self, names: Sequence[str]) -> str:
        """Return the folder of the chosen model; "" for a version that holds one model without a folder.

        Raises:
            SourceError: The version holds several models and none was chosen, or it lacks the chosen one.
        """
        if self._model_name and names and self._model_name not in names:
            raise SourceError(
                f"{self.uri} does not exist: the version holds the models {', '.join(names)}.",
                hint=f"Choose one of them, for example {self.uri.partition('#')[0]}#{names[0]}.",
            )
        if not self._model_name and len(names) > 1:
            raise SourceError(
                f"{self.uri} holds {len(names)} models: {', '.join(names)}.",
                hint=f"Compile each by its name, for example {self.uri}#{names[0]}.",
            )
        self._is_one_of_several = self._is_one_of_several or len(names) > 1
        return self._model_name if names else ""

    def _is_tracked(self, path: str) -> bool:
        """Return whether a field points to files in S3: an Artifact of Neptune, or a String with the URI."""
        kind = self._types.get(path)
        return kind == "Artifact" or (kind == "String" and self._text(path).startswith(SCHEME))

    def _text(self, path: str) -> str:
        return str(self._client.fetch(self._identity, path))

    def _tracked(self, path: str, relative: str, dest: Path) -> list[tuple[TrackedFile, Path]]:
        """Return the tracked files of a field, each with its place below `dest`."""
        if self._types[path] == "String":
            files = objects_at(self._text(path), self._settings)
        else:
            files = [TrackedFile(**values) for values in self._client.tracked_files(self._identity, path)]
        if relative and len(files) == 1:
            extension = PurePosixPath(files[0].location).suffix
            has_extension = "." in relative.rpartition("/")[2]
            return [(files[0], _below(dest, relative if has_extension else relative + extension, self.uri))]
        folder = _below(dest, relative, self.uri) if relative else dest
        return [(file, _below(folder, file.path, self.uri)) for file in files]

    def test_files(self, card: Mapping[str, Any], dest: Path) -> Path | None:
        """Download the test files that the card names; return None if it names none."""
        paths = _test_paths(card.get("model_test_files"), self.uri)
        if self._is_one_of_several:
            # The predictions come from a service around all models, so one model cannot repeat them.
            paths.pop("predictions", None)
        if not paths:
            return None
        dest.mkdir()
        for kind, path in paths.items():
            self._json(path, f"test file {kind}", "model_test_files in its card names it. ", dest / f"{kind}.json")
        return dest

    def _json(self, path: str, description: str, reason: str, file: Path) -> Any:
        """Write a JSON file or string to `file`, and return its content."""
        kind = self._types.get(path)
        if self._is_tracked(path):
            entries = [entry for entry, _ in self._tracked(path, "", self._work_dir)]
            if len(entries) != 1:
                raise SourceError(
                    f"{path} of {self.uri} tracks {len(entries)} files, expected one: the {description}.",
                    hint="Track that file alone.",
                )
            download_tracked([(entries[0], file)], self._settings, self.uri)
        elif kind == "String":
            file.write_text(self._text(path), "utf-8", "replace")
        elif kind == "File":
            self._download(path, file)
        else:
            readable = ("File", "String", "Artifact")
            fields = _summary({name: kind for name, kind in self._types.items() if kind in readable})
            raise SourceError(
                f"{self.uri} has no {description} at {path!r}.",
                hint=f"{reason}Upload it there. Fields: {fields or 'none'}.",
            )
        return read_json(file, f"{path} of {self.uri}")

    def _with_extension(self, path: str, relative: str) -> str:
        """Return the file's name with its extension, from Neptune if `config.json` was uploaded as `config`."""
        if "." in relative.rpartition("/")[2]:
            return relative
        extension = self._client.extension(self._identity, path)
        return f"{relative}.{extension}" if extension else relative

    def _download(self, path: str, dest: Path) -> None:
        try:
            dest.parent.mkdir(parents=True, exist_ok=True)
            # Into an existing folder the client would write under the name that the server sends.
            if dest.exists():
                raise FileExistsError
        except (FileExistsError, NotADirectoryError) as error:
            raise SourceError(
                f"{self.uri} holds two files, or a file and a folder, of the same name; one is {path!r}.",
                hint="Upload the model's folder again.",
            ) from error
        self._client.download(self._identity, path, dest)

    def _unpack(self, path: str, dest: Path) -> None:
        archive = self._work_dir / "files.zip"
        self._download(path, archive)
        try:
            with ZipFile(archive) as zip_file:
                for member in zip_file.infolist():
                    if not member.is_dir():
                        file = _below(dest, member.filename, self.uri)
                        file.parent.mkdir(parents=True, exist_ok=True)
                        with zip_file.open(member) as stream, file.open("xb") as target:
                            shutil.copyfileobj(stream, target)
        except _BROKEN as error:
            raise SourceError(
                f"The files at {path} of {self.uri} arrived as a broken archive: {first_line(error)}.",
                hint="Run again; if the error persists, upload the model's folder again.",
            ) from error
        archive.unlink()


def _below(folder: Path, relative: str, uri: str) -> Path:
    try:
        return folder / safe_relative_path(relative)
    except ValueError as error:
        raise SourceError(
            f"{uri} holds a file with an invalid path: {error}.", hint="Upload it under its own name."
        ) from error


def _test_paths(paths: Any, uri: str) -> dict[str, str]:
    """Return the attribute paths of the test files by kind, from an object or a list of paths."""
    if isinstance(paths, list):
        paths = {str(path).rstrip("/").rpartition("/")[2].removesuffix(".json"): path for path in paths}
    if paths is not None and not isinstance(paths, dict):
        raise SourceError(
            f"Expected an object or a list as model_test_files in the card of {uri}, got {paths!r:.80}.",
            hint=f"Name the attribute paths of {', '.join(_TEST_KINDS)}.",
        )
    return {kind: str(paths[kind]).strip("/") for kind in _TEST_KINDS if paths and paths.get(kind)}


def _summary(types: Mapping[str, str]) -> str:
    fields = [f"{path} ({kind})" for path, kind in sorted(types.items()) if not path.startswith("sys/")]
    return ", ".join(fields[:8]) + (", ..." if len(fields) > 8 else "")
