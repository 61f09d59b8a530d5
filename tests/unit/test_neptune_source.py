"""A model version in Neptune as source: the layouts that teams use, and the errors for incomplete ones."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import SecretStr
from safetensors.numpy import save_file

from compileflow.contracts.digests import file_digest
from compileflow.errors import SourceError, SourceUnavailableError
from compileflow.settings import Settings
from compileflow.sources import files as source_files
from compileflow.sources.neptune_version import NeptuneSource
from compileflow.spec import HfTask
from deployments.neptune_server.tokens import make_api_token
from tests.services.fault_proxy import Answer, CutResponse, FaultProxy
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


def test_pin_gives_the_whole_id_and_no_revision(team: Team, source: NeptuneSource) -> None:
    uri = team.version(card=None)
    key = uri.rpartition("/")[2].partition("-")[2]
    assert source.pin(uri, None) == (uri, None)
    assert source.pin(f"neptune://{team.project}/{key}", None) == (uri, None)
    with pytest.raises(SourceError, match="no revision 'main'"):
        source.pin(uri, "main")


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
    monkeypatch.setattr(source_files, "_LONGEST_JSON_BYTES", 100)
    uri = team.version(card=team.card())
    with pytest.raises(SourceError, match="at most 100"):
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
