"""file: a model that save_pretrained wrote on this machine, or a GGUF file."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from compileflow._process.folders import path_of_uri
from compileflow.contracts import LocatedSource
from compileflow.errors import SourceError
from compileflow.settings import Settings
from compileflow.sources import gguf_file
from compileflow.sources.files import choose_files_below

# Without a path, each of these would mean the current folder.
_EMPTY = ("", "file:", "file://", "file://localhost")


class FolderSource:
    """Reads a folder, whose digest of files serves as revision, or a GGUF file."""

    def __init__(self, settings: Settings):
        self._settings = settings

    def pin(self, location: str, revision: str | None) -> tuple[str, str | None]:
        """Return the URI, and for a GGUF file what decides its weights. A folder has no commits to pin.

        Raises:
            SourceError: A revision was given, or the location is empty.
        """
        path = local_path(location)
        commit = gguf_file.gguf_revision(path) if gguf_file.is_gguf(path) else None
        if revision not in (None, commit):
            kind = "folder" if commit is None else "file"
            raise SourceError(
                f"{location} is a {kind}, and a {kind} has no revision {revision!r}.",
                hint="Leave the revision empty, or give a Hub id.",
            )
        return path.as_uri(), commit

    def locate(self, location: str, revision: str | None, work_dir: Path) -> LocatedSource:
        """Choose the model's files in the folder, without a copy; a GGUF file is converted below `work_dir`.

        Raises:
            MissingPackageError: The packages that read a GGUF file are missing.
            SourceError: The folder does not exist or does not hold a model, or the GGUF file cannot be read.
        """
        uri, commit = self.pin(location, revision)
        folder = local_path(location)
        if commit is not None:
            files = gguf_file.convert_gguf(folder, work_dir, self._settings)
            return LocatedSource(uri=uri, revision=commit, folder=work_dir, files=files)
        if not folder.is_dir():
            raise SourceError(
                f"{folder} is not a folder.", hint="Give a model folder, or a Hub id as hf://owner/name."
            )
        return LocatedSource(uri=uri, revision="", folder=folder, files=choose_files_below(folder, str(folder)))


def local_path(location: str) -> Path:
    """Return the absolute path that a path or a file:// URI names.

    Raises:
        SourceError: The location is empty, or names a user or a port.
    """
    if location.startswith("file:") and {":", "@"} & set(urlsplit(location).netloc):
        raise SourceError(
            f"{location} is not the URI of a local folder.", hint="Write it as file:///absolute/path."
        )
    if location in _EMPTY:
        raise SourceError(
            f"Expected the folder of a model, got {location!r}.",
            hint="Give a model folder, or a Hub id as hf://owner/name.",
        )
    path = path_of_uri(location) if location.startswith("file:") else Path(location).expanduser()
    parts = path.absolute().parts
    # The folder above a link is not the one that its name suggests. Other links keep their names: those of models.
    last_up = max((position for position, part in enumerate(parts) if part == ".."), default=-1)
    return Path(*parts[: last_up + 1]).resolve().joinpath(*parts[last_up + 1 :]) if last_up > 0 else Path(*parts)
