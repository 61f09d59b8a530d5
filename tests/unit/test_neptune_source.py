"""A model version in Neptune as source: the layouts that teams use, and the errors for incomplete ones."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from pydantic import SecretStr
from safetensors.numpy import save_file

from compileflow.catalog import open_registry
from compileflow.contracts.digests import file_digest
from compileflow.contracts.json_files import read_json
from compileflow.errors import SourceError, SourceUnavailableError
from compileflow.settings import Settings, get_settings
from compileflow.sources.neptune_version import NeptuneSource
from compileflow.spec import HfTask
from compileflow.testing.registries import version_entry
from deployments.neptune_server.tokens import make_api_token
from tests.services.fault_proxy import Answer, CutResponse, FaultProxy
from tests.services.moto_server import Moto
from tests.services.neptune import Neptune
from tests.services.neptune_writer import NeptuneWriter

TEST_FILES = {"inputs": ["first", "second"], "inference_params": {"top_k": 1}, "predictions": [[{"label": "A"}]]}


class Team:
    """Writes source versions with the real client, in the way of a team."""

    def __init__(self, client: NeptuneWriter, project: str, model: Path, folder: Path):
        self.client, self.project, self.model, self.folder = client, project, model, folder

    def card(self, **changed: Any) -> dict[str, Any]:
        card: dict[str, Any] = {
            "model_params": {"huggingface_pipeline_task": "text-classification"},
            "model_artifact_attribute_path": "model/artifact",
            "model_test_files": {kind: f"model/test/{kind}" for kind in TEST_FILES},
        }
        return {name: value for name, value in (card | changed).items() if value is not None}

    def version(
        self, *, card: Any, files: dict[str, Path] | None = None, folder: str | None = None, **fields: Any
    ) -> str:
        """Create a version with a card, files by attribute path, and a file set from a glob."""
        written = {"model/model_card": self._json("model_card", card)} if card is not None else {}
        written |= {f"model/test/{kind}": self._json(kind, value) for kind, value in TEST_FILES.items()}
        written |= {path: str(file) for path, file in (files or {}).items()}
        sets = {} if folder is None else {"model/artifact": folder}
        identity = self.client("make_version", self.project, "SRC", fields, written, sets)
        return f"neptune://{self.project}/{identity}"

    def tracked(self, locations: dict[str, str], moto: Moto) -> str:
        """Create a version whose attributes track files in S3."""
        identity = self.client("make_version", self.project, "SRC", {}, {}, {})
        self.client("track", self.project, identity, locations, moto.url)
        return f"neptune://{self.project}/{identity}"

    def pointing(self, fields: dict[str, str]) -> str:
        """Create a version with these fields and nothing else."""
        return f"neptune://{self.project}/{self.client('make_version', self.project, 'SRC', fields, {}, {})}"

    def _json(self, name: str, value: Any) -> str:
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(value))
        return str(path)


@pytest.fixture
def team(neptune_client: NeptuneWriter, neptune_project: str, tmp_path: Path) -> Team:
    for name in ("team", "model"):
        (tmp_path / name).mkdir()
    model = tmp_path / "model"
    (model / "config.json").write_text('{"model_type": "bert"}')
    (model / "tokenizer.json").write_text('{"version": "1.0"}')
    save_file({"weight": np.arange(60_000, dtype=np.float32)}, model / "model.safetensors")
    return Team(neptune_client, neptune_project, model, tmp_path / "team")


@pytest.fixture
def source(neptune_project: str, settings: Settings) -> NeptuneSource:
    return NeptuneSource(Settings(home=settings.home))


@pytest.fixture(scope="module")
def proxy(neptune_server: Neptune) -> Iterator[FaultProxy]:
    with FaultProxy(neptune_server.url) as running:
        yield running


def digests(folder: Path, names: tuple[str, ...]) -> dict[str, str]:
    return {name: file_digest(folder / name) for name in names}


def test_file_set_is_fetched_with_task_and_test_files(team: Team, source: NeptuneSource, tmp_path: Path) -> None:
    uri = team.version(card=team.card(), folder=f"{team.model}/*")
    located = source.locate(uri, None, tmp_path / "work")
    assert (located.uri, located.revision, located.hf_task) == (uri, "", HfTask.TEXT_CLASSIFICATION)
    assert {"config.json", "model.safetensors"} <= set(located.files)
    assert digests(located.folder, located.files) == digests(team.model, located.files)
    assert located.test_files is not None
    contents = {path.name: json.loads(path.read_text()) for path in located.test_files.iterdir()}
    assert contents == {f"{kind}.json": value for kind, value in TEST_FILES.items()}


def test_files_of_their_own_are_fetched_by_their_path(team: Team, source: NeptuneSource, tmp_path: Path) -> None:
    # One file under its complete name, the others in the client's way: without the extension.
    files = {
        f"nested/weights/{path.name if path.suffix == '.safetensors' else path.stem}": path
        for path in team.model.iterdir()
        if path.is_file()
    }
    # Larger than one block of a download.
    files["nested/weights/notes.txt"] = team.folder / "notes.txt"
    files["nested/weights/notes.txt"].write_bytes(bytes(3 << 20))
    card = team.card(
        model_artifact_attribute_path="nested/weights/",
        model_test_files=[f"model/test/{kind}" for kind in TEST_FILES],
    )
    located = source.locate(team.version(card=card, files=files), None, tmp_path / "work")
    assert {path.name for path in located.folder.iterdir()} == {path.name for path in files.values()}
    assert digests(located.folder, located.files) == digests(team.model, located.files)
    assert located.test_files is not None
    assert len(list(located.test_files.iterdir())) == len(TEST_FILES)


def test_folder_that_was_uploaded_by_its_own_name_is_found(
    team: Team, source: NeptuneSource, tmp_path: Path
) -> None:
    files = {f"model/artifact/my-model/{path.name}": path for path in team.model.iterdir() if path.is_file()}
    uri = team.version(card=team.card(model_test_files=None, model_params={}), files=files)
    located = source.locate(uri, None, tmp_path / "work")
    assert located.folder.name == "my-model"
    assert "config.json" in located.files
    assert (located.hf_task, located.test_files) == (None, None)


def json_file(folder: Path, name: str, value: Any) -> Path:
    path = folder / name
    path.write_text(json.dumps(value))
    return path


class TestSeveralModels:
    """Two models below the path of the model, as a NER service with two languages registers them."""

    CARD: ClassVar[dict[str, Any]] = {
        "model_type": "trained",
        "ner_model_params_base": {"huggingface_pipeline_task": "ner"},
        "ner_model_params_kj": {"huggingface_pipeline_task_kj": "token-classification"},
        "model_params": None,
    }

    @pytest.fixture
    def uri(self, team: Team) -> str:
        files = {}
        for name in ("base_ner", "korean_japanese_ner"):
            config = json_file(team.folder, f"{name}.json", {"model_type": "bert", "_name_or_path": name})
            files |= {
                f"model/artifact/{name}/{path.name}": path for path in team.model.iterdir() if path.is_file()
            }
            files[f"model/artifact/{name}/config.json"] = config
        return team.version(card=team.card(**self.CARD), files=files)

    def test_one_is_chosen_by_its_name(self, uri: str, source: NeptuneSource, tmp_path: Path) -> None:
        for name in ("base_ner", "korean_japanese_ner"):
            located = source.locate(f"{uri}#{name}", None, tmp_path / name)
            assert located.uri == source.pin(f"{uri}#{name}", None)[0] == f"{uri}#{name}"
            assert located.hf_task is HfTask.TOKEN_CLASSIFICATION
            assert json.loads((located.folder / "config.json").read_text())["_name_or_path"] == name
            assert {"config.json", "model.safetensors"} <= set(located.files)
            # The predictions are those of the service, which uses both models.
            assert located.test_files is not None
            assert {path.name for path in located.test_files.iterdir()} == {"inputs.json", "inference_params.json"}

    @pytest.mark.parametrize(
        ("name", "message", "hint"),
        [
            ("", "holds 2 models: base_ner, korean_japanese_ner", "#base_ner"),
            ("#french_ner", "the version holds the models base_ner, korean_japanese_ner", "#base_ner"),
        ],
    )
    def test_choice_that_is_missing_or_wrong_lists_the_models(
        self, name: str, message: str, hint: str, uri: str, source: NeptuneSource, tmp_path: Path
    ) -> None:
        with pytest.raises(SourceError, match=message) as caught:
            source.locate(f"{uri}{name}", None, tmp_path / "work")
        assert hint in caught.value.hint
        assert not list((tmp_path / "work" / "model").iterdir())

    def test_name_of_the_only_model_is_refused_if_it_has_none(
        self, team: Team, source: NeptuneSource, tmp_path: Path
    ) -> None:
        uri = team.version(card=team.card(), folder=f"{team.model}/*")
        with pytest.raises(SourceError, match="holds one model, which has no name"):
            source.locate(f"{uri}#base_ner", None, tmp_path / "work")


class TestTrackedFiles:
    """Files that lie in S3, which the version's attributes only refer to."""

    @pytest.fixture
    def s3_source(self, bucket: str, settings: Settings) -> NeptuneSource:
        return NeptuneSource(get_settings())

    @pytest.fixture
    def uploaded(self, team: Team, bucket: str, moto: Moto) -> dict[str, str]:
        """Locations of the model's files, the card and the test files in S3, by attribute path."""
        files = {f"model/artifact/{path.name}": path for path in team.model.iterdir() if path.is_file()}
        files["model/model_card"] = json_file(team.folder, "card.json", team.card())
        files |= {
            f"model/test/{kind}": json_file(team.folder, f"{kind}.json", value)
            for kind, value in TEST_FILES.items()
        }
        for path, file in files.items():
            moto.client().put_object(Bucket=bucket, Key=f"registry/SRC-1/{path}", Body=file.read_bytes())
        return {path: f"s3://{bucket}/registry/SRC-1/{path}" for path in files}

    def test_version_whose_files_are_all_tracked_is_fetched(
        self, team: Team, uploaded: dict[str, str], s3_source: NeptuneSource, moto: Moto, tmp_path: Path
    ) -> None:
        uri = team.tracked(uploaded, moto)
        located = s3_source.locate(uri, None, tmp_path / "work")
        assert located.hf_task is HfTask.TEXT_CLASSIFICATION
        assert digests(located.folder, located.files) == digests(team.model, located.files)
        assert {"config.json", "tokenizer.json", "model.safetensors"} == set(located.files)
        assert located.test_files is not None
        contents = {path.name: json.loads(path.read_text()) for path in located.test_files.iterdir()}
        assert contents == {f"{kind}.json": value for kind, value in TEST_FILES.items()}

    def test_folder_that_one_attribute_tracks_is_fetched(
        self,
        team: Team,
        uploaded: dict[str, str],
        s3_source: NeptuneSource,
        bucket: str,
        moto: Moto,
        tmp_path: Path,
    ) -> None:
        locations = {path: place for path, place in uploaded.items() if not path.startswith("model/artifact")}
        locations["model/artifact"] = f"s3://{bucket}/registry/SRC-1/model/artifact"
        located = s3_source.locate(team.tracked(locations, moto), None, tmp_path / "work")
        assert digests(located.folder, located.files) == digests(team.model, located.files)

    def test_attributes_that_hold_the_uris_are_followed(
        self, team: Team, uploaded: dict[str, str], s3_source: NeptuneSource, bucket: str, tmp_path: Path
    ) -> None:
        folder = {path: place for path, place in uploaded.items() if not path.startswith("model/artifact")}
        folder["model/artifact"] = f"s3://{bucket}/registry/SRC-1/model/artifact/"
        for number, fields in enumerate((uploaded, folder)):
            located = s3_source.locate(team.pointing(fields), None, tmp_path / str(number))
            assert located.hf_task is HfTask.TEXT_CLASSIFICATION
            assert digests(located.folder, located.files) == digests(team.model, located.files)
            assert len(located.files) == 3
        gone = folder | {"model/artifact": f"s3://{bucket}/registry/SRC-2/"}
        with pytest.raises(SourceError, match="SRC-2/ does not exist"):
            s3_source.locate(team.pointing(gone), None, tmp_path / "gone")

    def test_object_that_was_replaced_or_deleted_is_one_clear_error(
        self,
        team: Team,
        uploaded: dict[str, str],
        s3_source: NeptuneSource,
        bucket: str,
        moto: Moto,
        tmp_path: Path,
    ) -> None:
        uri = team.tracked(uploaded, moto)
        key = "registry/SRC-1/model/artifact/config.json"
        moto.client().put_object(Bucket=bucket, Key=key, Body=b"{}")
        with pytest.raises(SourceError, match=r"config\.json was replaced since"):
            s3_source.locate(uri, None, tmp_path / "replaced")
        moto.client().delete_object(Bucket=bucket, Key=key)
        with pytest.raises(SourceError, match="NoSuchKey") as caught:
            s3_source.locate(uri, None, tmp_path / "deleted")
        assert "\n" not in str(caught.value)


def test_pin_gives_the_whole_id_and_no_revision(team: Team, source: NeptuneSource) -> None:
    uri = team.version(card=None)
    key = uri.rpartition("/")[2].partition("-")[2]
    assert source.pin(uri, None) == (uri, None)
    assert source.pin(f"neptune://{team.project}/{key}", None) == (uri, None)
    with pytest.raises(SourceError, match="no revision 'main'"):
        source.pin(uri, "main")


def test_versions_of_a_project_are_listed_without_those_that_compileflow_registered(
    team: Team, source: NeptuneSource, settings: Settings
) -> None:
    uris = [team.version(card=team.card()) for _ in range(2)]
    open_registry(f"neptune://{team.project}", Settings(home=settings.home)).register(version_entry("ner", 1))
    versions = sorted(source.versions(f"neptune://{team.project}"), key=lambda version: version.created_at)
    assert [version.uri for version in versions] == uris
    # The model's id is the version's without its number.
    assert {version.name for version in versions} == {uris[0].rpartition("/")[2].rpartition("-")[0]}
    with pytest.raises(SourceError, match="neptune://"):
        source.versions("neptune://no-project")


def test_unknown_id_lists_similar_ones(team: Team, source: NeptuneSource) -> None:
    uri = team.version(card=None)
    with pytest.raises(SourceError, match="'SRC-7'") as caught:
        source.pin(f"neptune://{team.project}/SRC-7", None)
    assert uri.rpartition("/")[2] in caught.value.hint


@pytest.mark.parametrize(
    ("changed", "message", "hint"),
    [
        (None, "no model card", "Upload it"),
        ({"model_params": {"huggingface_pipeline_task": "translation"}}, "'translation'", "text-classification"),
        ({"model_artifact_attribute_path": None}, "model_artifact_attribute_path", "attribute path"),
        ({"model_artifact_attribute_path": "model/none"}, "'model/none'", "save_pretrained"),
        ({"model_test_files": {"inputs": "model/none"}}, "no test file inputs", "model/test/inputs"),
        ({"model_test_files": "model/test"}, "Expected an object or a list", "inputs"),
    ],
)
def test_incomplete_version_is_one_clear_error(
    changed: dict[str, Any] | None, message: str, hint: str, team: Team, source: NeptuneSource, tmp_path: Path
) -> None:
    card = None if changed is None else team.card(**changed)
    uri = team.version(card=card, folder=f"{team.model}/*")
    with pytest.raises(SourceError, match=message) as caught:
        source.locate(uri, None, tmp_path / "work")
    assert uri in caught.value.message
    assert hint in caught.value.hint
    assert "\n" not in str(caught.value)


def test_card_that_is_not_json_is_one_clear_error(team: Team, source: NeptuneSource, tmp_path: Path) -> None:
    for number, card in enumerate(("{not json", "[" * 16_000)):
        uri = team.version(card=None, **{"model/model_card": card})
        with pytest.raises(SourceError, match="is not JSON") as caught:
            source.locate(uri, None, tmp_path / str(number))
        assert "\n" not in str(caught.value)


def test_card_that_is_too_large_to_read_is_refused(
    team: Team, source: NeptuneSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(read_json.__kwdefaults__, "most_bytes", 100)
    uri = team.version(card=team.card())
    with pytest.raises(SourceError, match="larger than"):
        source.locate(uri, None, tmp_path / "work")


def test_nothing_is_written_and_no_path_leaves_the_folder(
    team: Team, proxy: FaultProxy, neptune_server: Neptune, settings: Settings, tmp_path: Path
) -> None:
    uri = team.version(card=team.card(), folder=f"{team.model}/*")
    token = SecretStr(neptune_server.token_for(proxy.url))
    source = NeptuneSource(Settings(home=settings.home, neptune_api_token=token, neptune_timeout_s=10))
    source.locate(uri, None, tmp_path / "work")
    writing = ("/operations", "/ping", "/upload", "/multipart", "/experiments/trash")
    assert not [request for request in proxy.seen if any(part in request.path for part in writing)]
    proxy.inject(CutResponse(100), path="fileset/zip/download")
    with pytest.raises(SourceUnavailableError, match="downloading model/artifact"):
        source.locate(uri, None, tmp_path / "cut")
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        archive.writestr("../outside.txt", "x")
    proxy.inject(
        Answer(200, body.getvalue(), {"Content-Disposition": "filename=a.zip"}), path="fileset/zip/download"
    )
    with pytest.raises(SourceError, match="leaves its folder"):
        source.locate(uri, None, tmp_path / "again")
    assert not list(tmp_path.rglob("outside.txt"))
    for number, broken in enumerate((encrypted(), damaged(), same_name_as_a_folder())):
        proxy.inject(Answer(200, broken, {"Content-Disposition": "filename=a.zip"}), path="fileset/zip/download")
        with pytest.raises(SourceError, match="broken archive") as caught:
            source.locate(uri, None, tmp_path / f"broken-{number}")
        assert "\n" not in str(caught.value)


def zipped(*members: tuple[str, bytes]) -> bytes:
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return body.getvalue()


def encrypted() -> bytes:
    body = bytearray(zipped(("config.json", b"{}" * 100)))
    # The flags of the entry, and of its record in the directory.
    body[6] |= 1
    body[body.index(b"PK\x01\x02") + 8] |= 1
    return bytes(body)


def damaged() -> bytes:
    body = bytearray(zipped(("config.json", bytes(range(256)) * 100)))
    body[45] ^= 0xFF
    body[46] ^= 0xFF
    return bytes(body)


def same_name_as_a_folder() -> bytes:
    return zipped(("a", b"file"), ("a/b/c", b"file below it"))


def test_two_fields_of_one_file_name_are_one_clear_error(
    team: Team, source: NeptuneSource, tmp_path: Path
) -> None:
    files = {f"model/artifact/{path.name}": path for path in team.model.iterdir() if path.is_file()}
    # A file `a.d` in the client's naming, and a folder of that name.
    inner = team.folder / "inner"
    inner.write_text("x")
    outer = team.folder / "outer.d"
    outer.write_text("x")
    files |= {"model/artifact/a.d/inner.txt": inner, "model/artifact/a": outer}
    with pytest.raises(SourceError, match="two files") as caught:
        source.locate(team.version(card=team.card(), files=files), None, tmp_path / "work")
    assert "a.d" in caught.value.message


def test_unknown_project_is_told(source: NeptuneSource) -> None:
    with pytest.raises(SourceError, match="no project 'tests/none'"):
        source.pin("neptune://tests/none/SRC-1", None)


@pytest.mark.slow
def test_wrong_token_and_dead_server_are_told_apart(
    neptune_project: str, neptune_server: Neptune, settings: Settings
) -> None:
    with FaultProxy(neptune_server.url) as ended:
        down = neptune_server.token_for(ended.url)
    wrong = make_api_token(neptune_server.url, "not-its-key")
    for token, kind, hint in ((wrong, SourceError, "NEPTUNE_API_TOKEN"), (down, SourceUnavailableError, "Check")):
        wrong_settings = Settings(home=settings.home, neptune_api_token=SecretStr(token), neptune_timeout_s=4)
        with pytest.raises(SourceError) as caught:
            NeptuneSource(wrong_settings).pin(f"neptune://{neptune_project}/SRC-1", None)
        assert type(caught.value) is kind
        assert hint in caught.value.hint


def test_uri_without_a_version_and_absent_token_are_refused(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NEPTUNE_API_TOKEN", raising=False)
    source = NeptuneSource(Settings(home=settings.home))
    with pytest.raises(SourceError, match="Expected the URI of a model version"):
        source.pin("neptune://workspace/project", None)
    with pytest.raises(SourceError, match="NEPTUNE_API_TOKEN is not set"):
        source.pin("neptune://workspace/project/SRC-1", None)
