"""mlflow: a model version in MLflow's registry, in the layout of its transformers flavor or of save_pretrained.

The flavor (mlflow.transformers.save_model) writes MLmodel, the model below `model/`, and tokenizer, feature
extractor and image processor each below `components/`. Its `task` is the task of the pipeline.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compileflow._process.folders import os_errors
from compileflow.contracts import LocatedSource, SourceVersion
from compileflow.contracts.digests import safe_relative_path
from compileflow.contracts.json_files import read_bytes
from compileflow.contracts.sources import TEST_FILES
from compileflow.errors import SourceError, SourceUnavailableError, SpecError, first_line
from compileflow.registries.mlflow.client import SCHEME, MlflowPlace, error_code, pages, parse_place
from compileflow.registries.mlflow.tags import SCHEMA, time_of
from compileflow.settings import Settings
from compileflow.sources.files import card_task, choose_files_below, model_folder, read_json

_CARD = "model_card.json"
_MOST_MLMODEL_BYTES = 2**20


class MlflowSource:
    """Downloads a version's artifacts. A run's files may be replaced at any time, so a version has no revision."""

    def __init__(self, settings: Settings):
        """Accept the settings that every source gets; MLflow's are in the location or in its own environment."""

    def check(self, location: str, revision: str | None) -> None:
        """Refuse a wrong location. No request is sent.

        Raises:
            SourceError: The location does not name a version, or a revision was given.
        """
        _parse(location, revision)

    def pin(self, location: str, revision: str | None) -> tuple[str, str | None]:
        """Return the location with the current number of its alias, without a commit.

        Raises:
            SourceError: The model, number or alias does not exist, or a revision was given.
            SourceUnavailableError: MLflow did not answer.
        """
        place, name, ref = _parse(location, revision)
        with _calls(place, f"find {name}") as client:
            return _uri(place, name, _find(client, place, name, ref)), None

    def versions(self, place: str) -> list[SourceVersion]:
        """Return the versions of all models that compileflow did not register.

        Raises:
            SourceError: The URI is wrong, or MLflow refused.
            SourceUnavailableError: MLflow did not answer.
        """
        try:
            parsed_place = parse_place(place)
        except SpecError as error:
            raise SourceError(error.message, hint=error.hint) from error
        with _calls(parsed_place, "list versions") as client:
            return [
                SourceVersion(
                    model=_uri(parsed_place, item.name, item),
                    uri=_uri(parsed_place, item.name, item),
                    name=item.name,
                    created_at=time_of(item.creation_timestamp).isoformat(),
                )
                for item in pages(client.search_model_versions, "")
                if SCHEMA not in item.tags
            ]

    def locate(self, location: str, revision: str | None, work_dir: Path) -> LocatedSource:
        """Download the version's files to `work_dir`, and collect the parts of the model in one folder.

        Raises:
            SourceError: The version does not exist, or does not hold a model that save_pretrained wrote.
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
        folder = _merged(root, flavor, uri) if flavor else model_folder(root)
        return LocatedSource(
            uri=uri,
            revision="",
            folder=folder,
            files=choose_files_below(folder, uri),
            hf_task=card_task(_card(root, folder, uri), uri, flavor.get("task") or version.tags.get("hf_task")),
            test_files=_test_files(root, folder, work_dir / "test_files"),
        )


def _parse(location: str, revision: str | None) -> tuple[MlflowPlace, str, str]:
    """Split mlflow:TRACKING#NAME@REF; the last part is empty for the newest version."""
    tracking, _, version = location.partition("#")
    name, _, ref = version.partition("@")
    if revision is not None or not name:
        raise SourceError(
            "A model version in MLflow does not have a revision."
            if name
            else "Expected the location of a model version in MLflow, got one without a model's name.",
            hint=f"Write it as {SCHEME}http://host:port#NAME@NUMBER, or @ALIAS.",
        )
    try:
        return parse_place(tracking), name, ref
    except SpecError as error:
        raise SourceError(error.message, hint=error.hint) from error


def _uri(place: MlflowPlace, name: str, version: Any) -> str:
    return f"{place.uri}#{name}@{version.version}"


@contextmanager
def _calls(place: MlflowPlace, action: str) -> Iterator[Any]:
    if place.file is not None and not place.file.is_file():
        # MLflow would create a new database there.
        raise SourceError(f"{place.file} does not exist.", hint="Give the path of an existing MLflow database.")
    with place.calls(action, refused=SourceError, unavailable=SourceUnavailableError) as client:
        yield client


def _find(client: Any, place: MlflowPlace, name: str, ref: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        aliases = {str(alias): str(number) for alias, number in client.get_registered_model(name).aliases.items()}
        versions = {str(item.version): item for item in client.search_model_versions(f"name = '{name}'")}
    except MlflowException as error:
        if error_code(error) != "RESOURCE_DOES_NOT_EXIST":
            raise
        names = ", ".join(sorted(model.name for model in client.search_registered_models(max_results=20)))
        raise SourceError(
            f"{place.uri} has no model {name!r}.", hint=f"Models: {names}." if names else "It has no models."
        ) from error
    numbers = sorted(versions, key=int, reverse=True)
    number = aliases.get(ref, ref) if ref else next(iter(numbers), "")
    if number not in versions:
        choices = numbers + [f"{alias} ({number})" for alias, number in sorted(aliases.items())]
        raise SourceError(
            f"{name} at {place.uri} has no version or alias {ref!r}.",
            hint=f"Versions: {', '.join(choices) or 'none'}.",
        )
    return versions[number]


def _download(client: Any, place: MlflowPlace, version: Any, dest: Path) -> Path:
    uri = client.get_model_version_download_uri(version.name, str(version.version))
    repository = place.files_at(uri)
    if repository is None:
        raise SourceError(
            f"{version.name} version {version.version} names files at {uri}, and {place.uri} keeps none there.",
            hint="Log the model to this MLflow. A server keeps files itself (--serve-artifacts) or in an object "
            "store; a SQLite file keeps them in mlruns or mlartifacts beside it.",
        )
    return Path(repository.download_artifacts("", dst_path=str(dest)))


def _flavor(root: Path, uri: str) -> dict[str, str]:
    """Return the transformers flavor in MLmodel, with "" for what is not a text; empty without the flavor."""
    import yaml

    path = root / "MLmodel"
    if not path.is_file():
        return {}
    try:
        flavors = yaml.safe_load(read_bytes(path, most_bytes=_MOST_MLMODEL_BYTES))["flavors"]
        flavor = dict(flavors.get("transformers") or {})
        # Any other value may be huge as a text.
        return {str(name): value if isinstance(value, str) else "" for name, value in flavor.items()}
    except (yaml.YAMLError, RecursionError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(
            f"MLmodel of {uri} cannot be read: {first_line(error)}.", hint="Log the model to MLflow again."
        ) from error


def _merged(root: Path, flavor: Mapping[str, str], uri: str) -> Path:
    """Copy tokenizer and processors beside the model, in the layout of save_pretrained."""
    if "peft_adaptor" in flavor:
        raise SourceError(
            f"{uri} is an adapter without its base model.", hint="Merge it (merge_and_unload) and log the result."
        )
    try:
        folder = root / safe_relative_path(flavor.get("model_binary") or "model")
    except ValueError as error:
        raise SourceError(
            f"MLmodel of {uri} names an invalid folder: {error}.", hint="Log the model to MLflow again."
        ) from error
    if not folder.is_dir():
        base = flavor.get("source_model_name") or flavor.get("local_base_model_path") or "the base model"
        revision = flavor.get("source_model_revision")
        raise SourceError(
            f"{uri} was logged without weights; it refers to {base}.",
            hint=f"Compile {base}{f' at revision {revision}' if revision else ''}, or log the weights.",
        )
    with os_errors(folder, "write to"):
        for part in sorted((root / "components").glob("*/*")):
            if part.is_file() and not (folder / part.name).exists():
                shutil.copyfile(part, folder / part.name)
    return folder


def _card(root: Path, folder: Path, uri: str) -> dict[str, Any]:
    for path in (root / _CARD, folder / _CARD):
        if path.is_file():
            card = read_json(path, f"{_CARD} of {uri}")
            return card if isinstance(card, dict) else {}
    return {}


def _test_files(root: Path, folder: Path, dest: Path) -> Path | None:
    for place in (root, root / "test_files", folder):
        if (place / TEST_FILES[0]).is_file():
            with os_errors(dest, "write to"):
                dest.mkdir()
                for name in TEST_FILES:
                    if (place / name).is_file():
                        shutil.copyfile(place / name, dest / name)
            return dest
    return None
