"""file: a model that save_pretrained wrote on this machine."""

from __future__ import annotations

from pathlib import Path

from compileflow._process.folders import path_of_uri
from compileflow.contracts import LocatedSource
from compileflow.errors import SourceError
from compileflow.settings import Settings
from compileflow.sources.files import choose_files_below

# Without a path, each of these would mean the current folder.
_EMPTY = ("", "file:", "file://", "file://localhost")


class FolderSource:
    """Reads a folder; the digest of its files serves as revision."""

    def __init__(self, settings: Settings):
        """Accept the settings that every source gets; a folder needs none of them."""

    def pin(self, location: str, revision: str | None) -> tuple[str, str | None]:
        """Return the folder's URI. A folder has no commits to pin.

        Raises:
            SourceError: A revision was given, or the location is empty.
        """
        if revision is not None:
            raise SourceError(
                f"{location} is a folder, and a folder has no revision {revision!r}.",
                hint="Leave the revision empty, or give a Hub id.",
            )
        return _path(location).as_uri(), None

    def locate(self, location: str, revision: str | None, work_dir: Path) -> LocatedSource:
        """Choose the model's files in the folder, without a copy.

        Raises:
            SourceError: The folder does not exist or does not hold a model.
        """
        uri, _ = self.pin(location, revision)
        folder = _path(location)
        if not folder.is_dir():
            raise SourceError(
                f"{folder} is not a folder.", hint="Give a model folder, or a Hub id as hf://owner/name."
            )
        return LocatedSource(uri=uri, revision="", folder=folder, files=choose_files_below(folder, str(folder)))


def _path(location: str) -> Path:
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
