"""Source models in MLflow: the layout of its transformers flavor, and folders that save_pretrained wrote."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from compileflow.catalog import get_source
from compileflow.contracts import LocatedSource
from compileflow.errors import SourceError, SourceUnavailableError
from compileflow.registries.mlflow.client import parse_place
from compileflow.settings import Settings
from compileflow.sources.files import check_files
from compileflow.spec import HfTask
from compileflow.testing.registries import TEST_FILES
from tests.conftest import ModelFactory
from tests.services.http_server import serving
from tests.services.mlflow import migrated_file

Publish = Callable[..., str]
MODEL = {"config.json": b"{}", "model.safetensors": b"weights", "tokenizer.json": b"{}"}
LOG_MODEL = """
import sys, mlflow, transformers
folder, model = sys.argv[1:]
mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
mlflow.set_experiment(experiment_id=mlflow.create_experiment("training", artifact_location=f"{folder}/mlruns"))
pipeline = transformers.pipeline("text-classification", model=model, tokenizer=model)
mlflow.transformers.log_model(
    pipeline, name="model", registered_model_name="reviews", pip_requirements=["transformers"]
)
"""


@pytest.fixture
def database(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, settings: Settings) -> Path:
    return migrated_file(tmp_path_factory, tmp_path / "mlflow.db")


@pytest.fixture
def publish(database: Path, tmp_path: Path) -> Publish:
    """Log files as a new version of `src` and return its location."""

    def publish(files: dict[str, bytes], *, tags: dict[str, str] | None = None) -> str:
        place = parse_place(f"mlflow:sqlite:///{database}")
        with place.calls("test", refused=SourceError, unavailable=SourceUnavailableError) as client:
            experiment = client.get_experiment_by_name("training")
            experiment_id = (
                experiment.experiment_id
                if experiment
                else client.create_experiment("training", str(tmp_path / "mlruns"))
            )
            run = client.create_run(experiment_id)
            for name, body in files.items():
                path = tmp_path / "to-log" / run.info.run_id / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(body)
            client.log_artifacts(run.info.run_id, str(tmp_path / "to-log" / run.info.run_id), "logged")
            if not client.search_registered_models("name = 'src'"):
                client.create_registered_model("src")
            version = client.create_model_version(
                "src", f"{run.info.artifact_uri}/logged", run.info.run_id, tags=tags or {}, await_creation_for=0
            )
            return f"{place.uri}#src@{version.version}"

    return publish


@pytest.fixture
def locate(settings: Settings, tmp_path: Path) -> Callable[[str], LocatedSource]:
    return lambda location: get_source("mlflow", settings).locate(location, None, tmp_path / "work")


def alias(database: Path, name: str, number: str) -> None:
    place = parse_place(f"mlflow:sqlite:///{database}")
    with place.calls("test", refused=SourceError, unavailable=SourceUnavailableError) as client:
        client.set_registered_model_alias("src", name, number)


def flavored(flavor: dict[str, Any], files: dict[str, bytes]) -> dict[str, bytes]:
    return {"MLmodel": json.dumps({"flavors": {"transformers": flavor}}).encode()} | files


@pytest.mark.slow
def test_model_that_mlflow_itself_logged_is_the_model_that_was_logged(
    database: Path, tiny_model: ModelFactory, locate: Callable[[str], LocatedSource]
) -> None:
    import torch
    from transformers import pipeline

    source_folder = tiny_model(HfTask.TEXT_CLASSIFICATION)
    command = [sys.executable, "-c", LOG_MODEL, str(database.parent), str(source_folder)]
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    located = locate(f"mlflow:sqlite:///{database}#reviews")
    assert located.uri.endswith("#reviews@1")
    assert located.hf_task is HfTask.TEXT_CLASSIFICATION
    assert located.test_files is None
    check_files(located.folder, located.files)
    with torch.no_grad():
        located_outputs, source_outputs = (
            pipeline("text-classification", model=str(folder), tokenizer=str(folder))("a text to compare")
            for folder in (located.folder, source_folder)
        )
    assert located_outputs == source_outputs


def test_folder_is_taken_as_it_was_logged(publish: Publish, locate: Callable[[str], LocatedSource]) -> None:
    located = locate(publish(MODEL, tags={"hf_task": "token-classification"}))
    assert {name: (located.folder / name).read_bytes() for name in located.files} == MODEL
    assert located.hf_task is HfTask.TOKEN_CLASSIFICATION
    assert located.revision == ""


def test_card_and_test_files_beside_the_model_come_along(
    publish: Publish, locate: Callable[[str], LocatedSource]
) -> None:
    card = {"model_params": {"huggingface_pipeline_task": "token-classification"}}
    files = {f"my-model/{name}": body for name, body in MODEL.items()} | TEST_FILES
    located = locate(publish(files | {"model_card.json": json.dumps(card).encode()}))
    assert sorted(located.files) == sorted(MODEL)
    assert located.hf_task is HfTask.TOKEN_CLASSIFICATION
    assert located.test_files is not None
    assert {path.name: path.read_bytes() for path in located.test_files.iterdir()} == TEST_FILES


def test_parts_of_the_flavor_are_brought_together(
    publish: Publish, locate: Callable[[str], LocatedSource]
) -> None:
    parts = {"model/config.json": b"{}", "model/model.safetensors": b"weights"}
    parts |= {"components/tokenizer/tokenizer.json": b"{}", "components/tokenizer/config.json": b"theirs"}
    parts |= {"components/image_processor/preprocessor_config.json": b"{}"}
    located = locate(publish(flavored({"task": "image-classification", "model_binary": "model"}, parts)))
    names = ["config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"]
    assert sorted(located.files) == names
    assert (located.folder / "config.json").read_bytes() == b"{}"
    assert located.hf_task is HfTask.IMAGE_CLASSIFICATION


@pytest.mark.parametrize(
    ("files", "message", "hint"),
    [
        (
            flavored({"source_model_name": "o/n", "source_model_revision": "c0"}, {}),
            "without weights",
            "revision c0",
        ),
        (flavored({"peft_adaptor": "peft"}, {"peft/x": b""}), "adapter", "merge_and_unload"),
        (
            flavored({"task": "translation"}, {f"model/{name}": b"{}" for name in MODEL}),
            "'translation'",
            "Supported tasks",
        ),
        ({"MLmodel": b"{", **MODEL}, "MLmodel", "again"),
        (flavored({"model_binary": "../../outside"}, MODEL), "leaves its folder", "again"),
        (flavored({"model_binary": "/"}, MODEL), "leaves its folder", "again"),
        ({"model_card.json": b"[" * 100_000, **MODEL}, "is not JSON", "JSON"),
        ({"model_card.json": b"{", **MODEL}, "is not JSON", "JSON"),
        ({"model.pkl": b"pickled"}, "config.json is missing", "save_pretrained"),
    ],
)
def test_version_without_a_model_is_one_clear_error(
    publish: Publish,
    locate: Callable[[str], LocatedSource],
    files: dict[str, bytes],
    message: str,
    hint: str,
) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        locate(publish(files))
    assert hint in caught.value.hint
    assert "\n" not in str(caught.value)


def test_alias_is_pinned_to_its_number(publish: Publish, database: Path, settings: Settings) -> None:
    first, second = publish(MODEL), publish(MODEL)
    alias(database, "champion", "1")
    source = get_source("mlflow", settings)
    base = first.removesuffix("@1")
    assert source.pin(f"{base}@champion", None) == source.pin(first, None) == (first, None)
    assert source.pin(base, None) == (second, None)


def test_absent_version_lists_what_there_is(publish: Publish, database: Path, settings: Settings) -> None:
    base = publish(MODEL).removesuffix("@1")
    alias(database, "champion", "1")
    for ref in ("7", "challenger"):
        with pytest.raises(SourceError, match=f"'{ref}'") as caught:
            get_source("mlflow", settings).pin(f"{base}@{ref}", None)
        assert caught.value.hint == "Versions: 1, champion (1)."
    with pytest.raises(SourceError, match="'other'") as caught:
        get_source("mlflow", settings).pin(f"{base.removesuffix('src')}other@1", None)
    assert caught.value.hint == "Models: src."


def test_absent_database_is_not_made(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        get_source("mlflow", settings).pin(f"mlflow:sqlite:///{tmp_path / 'absent.db'}#src@1", None)
    assert not (tmp_path / "absent.db").exists()


@pytest.mark.parametrize(
    ("location", "revision"),
    [("mlflow:http://h:1", None), ("mlflow:http://h:1#src@1", "main"), ("mlflow:ftp://h#src@1", None)],
)
def test_location_that_cannot_be_says_how_to_write_it(
    settings: Settings, location: str, revision: str | None
) -> None:
    with pytest.raises(SourceError) as caught:
        get_source("mlflow", settings).pin(location, revision)
    assert "mlflow:http://host:port" in caught.value.hint


def test_server_that_is_down_may_be_tried_again(settings: Settings) -> None:
    with pytest.raises(SourceUnavailableError, match="refused"):
        get_source("mlflow", settings).pin("mlflow:http://127.0.0.1:9#src@1", None)


@pytest.mark.parametrize("where", ["folder", "link", "fragment", "server", "run"])
def test_files_that_a_version_names_elsewhere_are_not_read(
    database: Path, tmp_path: Path, locate: Callable[[str], LocatedSource], where: str
) -> None:
    """Anyone who can write to MLflow could otherwise have a private folder compiled, or be sent its password."""
    asked: list[str] = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "config.json").write_text("{}")
    (tmp_path / "mlruns" / "x#").mkdir(parents=True)
    (tmp_path / "mlruns" / "link").symlink_to(tmp_path / "private")
    place = parse_place(f"mlflow:sqlite:///{database}")
    with serving(Server) as url:
        with place.calls("test", refused=SourceError, unavailable=SourceUnavailableError) as client:
            client.create_registered_model("src")
            run_id = None
            source = {
                "folder": (tmp_path / "private").as_uri(),
                "link": (tmp_path / "mlruns" / "link").as_uri(),
                "fragment": f"{tmp_path}/mlruns/x#/../../private",
                "server": f"{url}/api/2.0/mlflow-artifacts/artifacts/src",
            }.get(where)
            if source is None:
                run = client.create_run(client.create_experiment("training", str(tmp_path / "private")))
                with closing(sqlite3.connect(database)) as db, db:
                    db.execute("UPDATE runs SET artifact_uri = ?", [str(tmp_path / "private")])
                run_id, source = run.info.run_id, f"runs:/{run.info.run_id}"
            client.create_model_version("src", source, run_id, await_creation_for=0)
        with pytest.raises(SourceError, match="keeps none there"):
            locate(f"{place.uri}#src@1")
    assert asked == []


@pytest.mark.parametrize(
    ("uri", "is_own"),
    [
        ("mlflow-artifacts:/src", True),
        ("mlflow-artifacts://127.0.0.1:5000/src", True),
        ("http://127.0.0.1:5000/api/2.0/mlflow-artifacts/artifacts/src", True),
        ("s3://bucket/src", True),
        ("mlflow-artifacts://evil.example/src", False),
        ("mlflow-artifacts://evil.example:5000\\@127.0.0.1:5000/src", False),
        ("http://evil.example\\@127.0.0.1:5000/src", False),
        ("http://evil.example@127.0.0.1:5000/src", False),
        ("https://127.0.0.1:5000/src", False),
        ("ftp://127.0.0.1/src", False),
        ("file:///srv/private", False),
        ("/srv/private", False),
    ],
)
def test_files_of_a_server_are_read_from_itself_and_from_object_stores_alone(uri: str, is_own: bool) -> None:
    repository = parse_place("mlflow:http://127.0.0.1:5000").files_at(uri)
    assert (repository is not None) is is_own


def test_values_of_mlmodel_that_are_no_texts_are_left_out(
    publish: Publish, locate: Callable[[str], LocatedSource]
) -> None:
    # Ten levels of ten: as a text, more than any memory holds.
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 11)]
    mlmodel = "\n".join([*lines, "flavors: {transformers: {model_binary: *a10, task: *a10}}"])
    location = publish({"MLmodel": mlmodel.encode(), "model/config.json": b"{}", "model/model.safetensors": b"x"})
    assert "config.json" in locate(location).files


def test_folder_beside_the_database_that_is_a_link_is_not_one_of_its_own(database: Path, tmp_path: Path) -> None:
    place = parse_place(f"mlflow:sqlite:///{database}")
    (tmp_path / "private" / "model").mkdir(parents=True)
    for name in ("mlruns", "mlflow.artifacts"):
        (tmp_path / name).mkdir()
        assert place.files_at((tmp_path / name / "model").as_uri()) is not None
        (tmp_path / name).rmdir()
        (tmp_path / name).symlink_to(tmp_path / "private")
        assert place.files_at((tmp_path / name / "model").as_uri()) is None
