"""neptune: a model version of a Neptune server, laid out as teams that registered with Neptune's client do.

The version's card, `model/model_card`, names the task, the attribute path of the model's files, and the test
files. The files are a file set at that path, or single files below it. Nothing is ever written there.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from compileflow._process.folders import os_errors
from compileflow.contracts import LocatedSource
from compileflow.contracts.digests import safe_relative_path
from compileflow.errors import SourceError, SourceUnavailableError, SpecError, first_line
from compileflow.registries.neptune.address import parse_version
from compileflow.registries.neptune.client import NeptuneClient
from compileflow.settings import Settings
from compileflow.sources.files import card_task, choose_files, read_json

_CARD = "model/model_card"
_TEST_FILES = ("inputs", "inference_params", "predictions")
# What zipfile raises of an archive that is damaged, encrypted, or has one name twice.
_BROKEN = (
    BadZipFile, FileExistsError, NotADirectoryError, EOFError, zlib.error, RuntimeError, struct.error, ValueError,
)  # fmt: skip


class NeptuneSource:
    """Downloads what a model version's card names. Its files may be replaced at any time: there is no revision."""

    def __init__(self, settings: Settings):
        self._settings = settings

    def pin(self, location: str, revision: str | None) -> tuple[str, str | None]:
        """Ask for the version's whole id; there is nothing else to pin.

        Raises:
            SourceError: there is no such version, or a revision was given.
            SourceUnavailableError: the server did not answer.
        """
        client, identity = self._open(location, revision)
        return f"neptune://{client.project}/{identity}", None

    def locate(self, location: str, revision: str | None, work_dir: Path) -> LocatedSource:
        """Download the model's files and the test files below `work_dir`.

        Raises:
            SourceError: the version has no card, or lacks what its card names.
            SourceUnavailableError: the server did not answer.
        """
        client, identity = self._open(location, revision)
        with os_errors(work_dir, "download to"):
            work_dir.mkdir(parents=True, exist_ok=True)
            version = _Version(client, identity, work_dir)
            card = version.card()
            folder = _model_folder(version.model(card, work_dir / "model"))
            test_files = version.test_files(card, work_dir / "test_files")
        client.release()
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        return LocatedSource(
            uri=version.uri,
            revision="",
            folder=folder,
            files=choose_files(names, version.uri),
            hf_task=card_task(card, version.uri),
            test_files=test_files,
        )

    def _open(self, location: str, revision: str | None) -> tuple[NeptuneClient, str]:
        if revision is not None:
            raise SourceError(
                f"{location} is a model version, and a model version has no revision {revision!r}.",
                hint="Leave the revision empty; the id says which version.",
            )
        try:
            project, text = parse_version(location)
        except SpecError as error:
            raise SourceError(error.message, hint=error.hint) from error
        client = NeptuneClient(project, self._settings, refused=SourceError, unavailable=SourceUnavailableError)
        return client, client.version_id(text)


class _Version:
    """One model version, and the folder that downloads go to."""

    def __init__(self, client: NeptuneClient, identity: str, work_dir: Path):
        self.uri = f"neptune://{client.project}/{identity}"
        self._client = client
        self._identity = identity
        self._work_dir = work_dir
        self._types: Mapping[str, str] = client.types(identity)

    def card(self) -> dict[str, Any]:
        """Return the model card; it may be a JSON file or a string."""
        card = self._json(_CARD, "model card", "", self._work_dir / "model_card.json")
        if not isinstance(card, dict):
            raise SourceError(f"{_CARD} of {self.uri} is no JSON object.", hint="Upload it as a JSON object.")
        return card

    def model(self, card: Mapping[str, Any], out: Path) -> Path:
        """Download the files at the card's attribute path."""
        root = card.get("model_artifact_attribute_path")
        if not isinstance(root, str) or not root.strip("/"):
            raise SourceError(
                f"The card of {self.uri} names no model_artifact_attribute_path.",
                hint="Write the attribute path of the model's files into the card.",
            )
        root = root.strip("/")
        below = {path: kind for path, kind in self._types.items() if path == root or path.startswith(f"{root}/")}
        wanted = {path: kind for path, kind in below.items() if kind in ("File", "FileSet")}
        if not wanted or wanted.get(root) == "File":
            raise SourceError(
                f"{self.uri} has no files at {root!r}, where its card says the model is.",
                hint=f"Upload what save_pretrained wrote there. There is: {_listed(below) or 'nothing'}.",
            )
        out.mkdir()
        for path, kind in wanted.items():
            relative = path[len(root) + 1 :]
            if kind == "FileSet":
                self._unpack(path, _below(out, relative, self.uri) if relative else out)
            else:
                self._download(path, _below(out, self._with_extension(path, relative), self.uri))
        return out

    def test_files(self, card: Mapping[str, Any], out: Path) -> Path | None:
        """Download the test files that the card names; None where it names none."""
        paths = _named_test_files(card.get("model_test_files"), self.uri)
        if not paths:
            return None
        out.mkdir()
        for kind, path in paths.items():
            self._json(path, f"test file {kind}", "model_test_files of its card names it. ", out / f"{kind}.json")
        return out

    def _json(self, path: str, what: str, why: str, file: Path) -> Any:
        """Bring a JSON file or string to `file`, and return what it holds."""
        kind = self._types.get(path)
        if kind == "String":
            file.write_text(str(self._client.fetch(self._identity, path)), "utf-8", "replace")
        elif kind == "File":
            self._download(path, file)
        else:
            near = _listed({one: kind for one, kind in self._types.items() if kind in ("File", "String")})
            raise SourceError(
                f"{self.uri} has no {what} at {path!r}.",
                hint=f"{why}Upload it there. There is: {near or 'nothing'}.",
            )
        return read_json(file, f"{path} of {self.uri}")

    def _with_extension(self, path: str, relative: str) -> str:
        """Return the file's name; whoever uploads `config.json` as `config` leaves the rest to Neptune."""
        if "." in relative.rpartition("/")[2]:
            return relative
        extension = self._client.extension(self._identity, path)
        return f"{relative}.{extension}" if extension else relative

    def _download(self, path: str, out: Path) -> None:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            # Into a folder of that name the client would write by the name that the server gives.
            if out.exists():
                raise FileExistsError
        except (FileExistsError, NotADirectoryError) as error:
            raise SourceError(
                f"{self.uri} holds two files, or a file and a folder, of one name; one of them is {path!r}.",
                hint="Upload the model's folder again.",
            ) from error
        self._client.download(self._identity, path, out)

    def _unpack(self, path: str, out: Path) -> None:
        archive = self._work_dir / "files.zip"
        self._download(path, archive)
        try:
            with ZipFile(archive) as opened:
                for member in opened.infolist():
                    if not member.is_dir():
                        file = _below(out, member.filename, self.uri)
                        file.parent.mkdir(parents=True, exist_ok=True)
                        with opened.open(member) as stream, file.open("xb") as written:
                            while block := stream.read(1 << 20):
                                written.write(block)
        except _BROKEN as error:
            raise SourceError(
                f"The files at {path} of {self.uri} came as a broken archive: {first_line(error)}.",
                hint="Run again; if it stays, upload the model's folder again.",
            ) from error
        archive.unlink()


def _below(folder: Path, relative: str, uri: str) -> Path:
    try:
        return folder / safe_relative_path(relative)
    except ValueError as error:
        raise SourceError(
            f"{uri} holds a file that cannot be: {error}.", hint="Upload it under its name."
        ) from error


def _model_folder(root: Path) -> Path:
    """Return the folder with config.json: whoever uploads a folder by its own name has one more level."""
    inner = [path for path in root.iterdir() if (path / "config.json").is_file()]
    return inner[0] if len(inner) == 1 and not (root / "config.json").is_file() else root


def _named_test_files(named: Any, uri: str) -> dict[str, str]:
    """Return attribute paths of the test files by kind, from an object of them or from a list of paths."""
    if isinstance(named, list):
        named = {str(path).rstrip("/").rpartition("/")[2].removesuffix(".json"): path for path in named}
    if named is not None and not isinstance(named, dict):
        raise SourceError(
            f"model_test_files in the card of {uri} is neither an object nor a list.",
            hint=f"Name the attribute paths of {', '.join(_TEST_FILES)}.",
        )
    return {kind: str(named[kind]).strip("/") for kind in _TEST_FILES if named and named.get(kind)}


def _listed(types: Mapping[str, str]) -> str:
    shown = [f"{path} ({kind})" for path, kind in sorted(types.items()) if not path.startswith("sys/")]
    return ", ".join(shown[:8]) + (", ..." if len(shown) > 8 else "")
