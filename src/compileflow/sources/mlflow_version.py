"""mlflow: a model version of MLflow's registry, as MLflow's transformers flavor or save_pretrained lays it out.

The flavor (mlflow.transformers.save_model) writes MLmodel, the model below `model/`, and tokenizer, feature
extractor and image processor each below `components/`. Its `task` is the pipeline's. Others log the folder as it
is.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compileflow._process.folders import os_errors
from compileflow.contracts import LocatedSource
from compileflow.contracts.digests import safe_relative_path
from compileflow.contracts.sources import TEST_FILES
from compileflow.errors import SourceError, SourceUnavailableError, SpecError, first_line
from compileflow.registries.mlflow.client import SCHEME, MlflowPlace, error_code, parse_place
from compileflow.settings import Settings
from compileflow.sources.files import card_task, choose_files, read_json

_CARD = "model_card.json"


class MlflowSource:
    """Downloads a version's artifacts. A run's files may be replaced at any time: there is no revision."""

    def __init__(self, settings: Settings):
        """Take the settings that every source takes; MLflow's are in the location, or its own environment."""

    def pin(self, location: str, revision: str | None) -> tuple[str, str | None]:
        """Return the location with the number that its alias means now; there is no commit.

        Raises:
            SourceError: there is no such model, number or alias, or a revision was given.
            SourceUnavailableError: MLflow did not answer.
        """
        place, name, ref = _parse(location, revision)
        with _calls(place, f"find {name}") as client:
            return _uri(place, name, _find(client, place, name, ref)), None

    def locate(self, location: str, revision: str | None, work_dir: Path) -> LocatedSource:
        """Download the version's files below `work_dir`, and bring the model's parts into one folder.

        Raises:
            SourceError: the version is absent, or holds no model that save_pretrained wrote.
            SourceUnavailableError: MLflow did not answer.
        """
        place, name, ref = _parse(location, revision)
        with os_errors(work_dir, "download to"):
            (work_dir / "download").mkdir(parents=True)
        with _calls(place, f"download {name}") as client:
            version = _find(client, place, name, ref)
            root = _download(client, place, version, work_dir / "download")
        uri = _uri(place, name, version)
        flavor = _flavor(root, uri)
        folder = _merged(root, flavor, uri) if flavor else _model_folder(root)
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        return LocatedSource(
            uri=uri,
            revision="",
            folder=folder,
            files=choose_files(names, uri),
            hf_task=card_task(_card(root, folder, uri), uri, flavor.get("task") or version.tags.get("hf_task")),
            test_files=_test_files(root, folder, work_dir / "test_files"),
        )


def _parse(location: str, revision: str | None) -> tuple[MlflowPlace, str, str]:
    """Split mlflow:TRACKING#NAME@REF; the last part is empty for the newest version."""
    tracking, _, version = location.partition("#")
    name, _, ref = version.partition("@")
    if revision is not None or not name:
        raise SourceError(
            "A model version of MLflow has no revision of its own."
            if name
            else "The location names no model of MLflow.",
            hint=f"Write it as {SCHEME}http://host:port#NAME@NUMBER, or @ALIAS.",
        )
    try:
        return parse_place(tracking), name, ref
    except SpecError as error:
        raise SourceError(error.message, hint=error.hint) from error


def _uri(place: MlflowPlace, name: str, version: Any) -> str:
    return f"{place.uri}#{name}@{version.version}"


@contextmanager
def _calls(place: MlflowPlace, doing: str) -> Iterator[Any]:
    if place.file is not None and not place.file.is_file():
        # MLflow would make a new database there.
        raise SourceError(f"{place.file} does not exist.", hint="Give the database of an MLflow that is used.")
    with place.calls(doing, refused=SourceError, unavailable=SourceUnavailableError) as client:
        yield client


def _find(client: Any, place: MlflowPlace, name: str, ref: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        aliases = {str(alias): str(number) for alias, number in client.get_registered_model(name).aliases.items()}
        found = {str(one.version): one for one in client.search_model_versions(f"name = '{name}'")}
    except MlflowException as error:
        if error_code(error) != "RESOURCE_DOES_NOT_EXIST":
            raise
        names = ", ".join(sorted(model.name for model in client.search_registered_models(max_results=20)))
        raise SourceError(
            f"{place.uri} has no model {name!r}.", hint=f"It has: {names}." if names else "It has none."
        ) from error
    numbers = sorted(found, key=int, reverse=True)
    number = aliases.get(ref, ref) if ref else next(iter(numbers), "")
    if number not in found:
        listed = numbers + [f"{alias} ({number})" for alias, number in sorted(aliases.items())]
        raise SourceError(
            f"{name} at {place.uri} has no version or alias {ref!r}.",
            hint=f"It has: {', '.join(listed) or 'no versions'}.",
        )
    return found[number]


def _download(client: Any, place: MlflowPlace, version: Any, out: Path) -> Path:
    from mlflow.artifacts import download_artifacts

    uri = client.get_model_version_download_uri(version.name, str(version.version))
    return Path(download_artifacts(artifact_uri=uri, dst_path=str(out), tracking_uri=place.tracking_uri))


def _flavor(root: Path, uri: str) -> dict[str, Any]:
    """Return the transformers flavor's part of MLmodel, empty where there is none."""
    import yaml

    path = root / "MLmodel"
    if not path.is_file():
        return {}
    try:
        flavors = yaml.safe_load(path.read_text("utf-8"))["flavors"]
        return dict(flavors.get("transformers") or {})
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(
            f"MLmodel of {uri} cannot be read: {first_line(error)}.", hint="Log the model to MLflow again."
        ) from error


def _merged(root: Path, flavor: Mapping[str, Any], uri: str) -> Path:
    """Copy tokenizer and processors beside the model, where save_pretrained of a pipeline puts them."""
    if "peft_adaptor" in flavor:
        raise SourceError(
            f"{uri} is an adapter without its base model.", hint="Merge it (merge_and_unload) and log the result."
        )
    named = str(flavor.get("model_binary") or "model")
    try:
        folder = root / safe_relative_path(named)
    except ValueError as error:
        raise SourceError(
            f"MLmodel of {uri} names a folder that cannot be: {error}.", hint="Log it again."
        ) from error
    if not folder.is_dir():
        base = flavor.get("source_model_name") or flavor.get("local_base_model_path") or "the base model"
        revision = flavor.get("source_model_revision")
        raise SourceError(
            f"{uri} was logged without weights; it refers to {base}.",
            hint=f"Compile that one{f' at revision {revision}' if revision else ''}, or log with weights.",
        )
    with os_errors(folder, "write to"):
        for part in sorted((root / "components").glob("*/*")):
            if part.is_file() and not (folder / part.name).exists():
                shutil.copyfile(part, folder / part.name)
    return folder


def _model_folder(root: Path) -> Path:
    """Return the folder with config.json: whoever logs a folder by its own name has one more level."""
    inner = [path for path in sorted(root.iterdir()) if (path / "config.json").is_file()]
    return inner[0] if len(inner) == 1 and not (root / "config.json").is_file() else root


def _card(root: Path, folder: Path, uri: str) -> dict[str, Any]:
    for path in (root / _CARD, folder / _CARD):
        if path.is_file():
            card = read_json(path, f"{_CARD} of {uri}")
            return card if isinstance(card, dict) else {}
    return {}


def _test_files(root: Path, folder: Path, out: Path) -> Path | None:
    for place in (root, root / "test_files", folder):
        if (place / TEST_FILES[0]).is_file():
            with os_errors(out, "write to"):
                out.mkdir()
                for name in TEST_FILES:
                    if (place / name).is_file():
                        shutil.copyfile(place / name, out / name)
            return out
    return None
