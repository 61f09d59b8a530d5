from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from compileflow.errors import SourceError
from compileflow.settings import Settings
from compileflow.sources.files import check_files
from compileflow.sources.folder import FolderSource
from compileflow.spec import HfTask
from compileflow.steps.fetch import fetch_source, scheme_of
from tests.conftest import ModelFactory


@pytest.fixture
def source(settings: Settings) -> FolderSource:
    return FolderSource(settings)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "tokenizer.json").write_text("{}")
    save_file({"weight": np.arange(1000, dtype=np.float32)}, folder / "model.safetensors")
    return folder


def chosen(source: FolderSource, folder: Path) -> set[str]:
    located = source.locate(str(folder), None, folder.parent / "unused")
    check_files(located.folder, located.files)
    return set(located.files)


def write(path: Path, text: str = "{}") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_all_that_save_pretrained_wrote_is_chosen(
    source: FolderSource, tiny_model: ModelFactory, architecture: str
) -> None:
    folder = tiny_model(HfTask.TEXT_CLASSIFICATION, architecture)
    assert chosen(source, folder) == {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= chosen(source, folder)


def test_folder_is_pinned_by_its_uri_alone(source: FolderSource, model: Path) -> None:
    assert source.pin(str(model), None) == (model.as_uri(), None)
    assert source.pin(model.as_uri(), None) == (model.as_uri(), None)


def test_way_up_is_not_part_of_the_uri_and_links_keep_their_names(
    source: FolderSource, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "deep").mkdir(parents=True)
    (tmp_path / "latest").symlink_to(model)
    (tmp_path / "shortcut").symlink_to(tmp_path / "runs" / "deep")
    monkeypatch.chdir(tmp_path / "runs")
    assert source.pin("../model", None)[0] == model.as_uri()
    assert source.pin("../latest", None)[0] == (tmp_path / "latest").as_uri()
    assert source.pin("../shortcut/../../model", None)[0] == model.as_uri()
    assert source.pin(f"{tmp_path.as_uri()}/runs/../model", None)[0] == model.as_uri()


@pytest.mark.parametrize("name", ["my model", "100%", "a#b?c", "modèle & co"])
def test_uri_of_a_path_with_signs_names_its_folder(source: FolderSource, model: Path, name: str) -> None:
    folder = model.rename(model.with_name(name))
    for uri in (folder.as_uri(), f"file://{folder}".replace("%", "%25")):
        assert source.locate(uri, None, folder).folder == folder
        assert source.pin(uri, None) == (folder.as_uri(), None)


def test_nothing_is_copied(source: FolderSource, model: Path, tmp_path: Path) -> None:
    located = source.locate(str(model), None, tmp_path / "unused")
    assert located.folder == model
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize("name", ["pin", "locate"])
def test_folder_has_no_revisions(source: FolderSource, model: Path, name: str) -> None:
    asks: dict[str, Callable[[], object]] = {
        "pin": lambda: source.pin(str(model), "main"),
        "locate": lambda: source.locate(str(model), "main", model),
    }
    with pytest.raises(SourceError, match="a folder has no revision 'main'") as caught:
        asks[name]()
    assert "Leave the revision empty" in caught.value.hint


def test_absent_folder_is_refused(source: FolderSource, model: Path) -> None:
    for path in (model / "absent", model / "config.json"):
        with pytest.raises(SourceError, match="is not a folder") as caught:
            chosen(source, path)
        assert str(path) in caught.value.message


@pytest.mark.parametrize("location", ["", "file:", "file://", "file://localhost"])
def test_empty_path_is_refused_also_where_the_current_folder_is_a_model(
    source: FolderSource, model: Path, monkeypatch: pytest.MonkeyPatch, location: str
) -> None:
    monkeypatch.chdir(model)
    with pytest.raises(SourceError, match=f"Expected the folder of a model, got '{location}'"):
        source.locate(location, None, model.parent / "unused")


@pytest.mark.parametrize("owner", ["file", "folder"])
def test_path_below_something_on_this_machine_is_not_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    assert scheme_of(f"{owner}/model") == "file"
    assert scheme_of("owner/model") == scheme_of(f"hf://{owner}/model") == "hf"


def test_folder_without_config_is_refused(source: FolderSource, model: Path) -> None:
    (model / "config.json").rename(model / "config.bak")
    with pytest.raises(SourceError, match=r"config\.json is missing"):
        chosen(source, model)


def test_config_in_a_folder_below_is_not_the_models(source: FolderSource, model: Path) -> None:
    (model / "1_Pooling").mkdir()
    (model / "config.json").rename(model / "1_Pooling" / "config.json")
    with pytest.raises(SourceError, match=r"config\.json is missing"):
        chosen(source, model)


@pytest.mark.parametrize(
    "other_weights", [None, "model.safetensors.index.json", "tf_model.h5", "onnx/model.safetensors"]
)
def test_folder_without_weights_is_refused(source: FolderSource, model: Path, other_weights: str | None) -> None:
    (model / "model.safetensors").unlink()
    if other_weights:
        write(model / other_weights)
    with pytest.raises(SourceError, match="does not hold weights"):
        chosen(source, model)


@pytest.mark.parametrize("keep_bytes", [0, 4, 100, 1000])
def test_truncated_weights_are_refused(source: FolderSource, model: Path, keep_bytes: int) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep_bytes])
    with pytest.raises(SourceError, match=rf"model\.safetensors is truncated .*\({keep_bytes} bytes\)"):
        chosen(source, model)


def test_git_lfs_pointer_is_no_weights(source: FolderSource, model: Path) -> None:
    write(model / "model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(SourceError, match="truncated or not safetensors"):
        chosen(source, model)


def shard(model: Path, *, absent: int = 0) -> None:
    """Split the weights into three files, and omit the first `absent` ones."""
    (model / "model.safetensors").unlink()
    names = [f"model-{n:05}-of-00003.safetensors" for n in (1, 2, 3)]
    weight_map = {f"weight.{n}": name for n, name in enumerate(names)}
    write(model / "model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name in names[absent:]:
        save_file({"weight": np.zeros(10, dtype=np.float32)}, model / name)


def test_all_shards_and_their_index_are_chosen(source: FolderSource, model: Path) -> None:
    shard(model)
    assert sum("of-00003" in name for name in chosen(source, model)) == 3
    assert "model.safetensors.index.json" in chosen(source, model)


def test_absent_shard_is_named(source: FolderSource, model: Path) -> None:
    shard(model, absent=2)
    with pytest.raises(
        SourceError,
        match=r"names the shard model-00001-of-00003\.safetensors, which is missing \(2 shards in all\)",
    ):
        chosen(source, model)


def test_shard_outside_the_folder_is_refused_as_such(source: FolderSource, model: Path) -> None:
    (model / "model.safetensors").rename(model.parent / "outside.safetensors")
    shard_outside = {"weight_map": {"weight": "../outside.safetensors"}}
    write(model / "model.safetensors.index.json", json.dumps(shard_outside))
    save_file({"weight": np.zeros(10, dtype=np.float32)}, model / "model-00001-of-00002.safetensors")
    with pytest.raises(SourceError, match=r"names the shard \.\./outside\.safetensors, which lies outside"):
        chosen(source, model)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": {}}}'])
def test_broken_index_is_named(source: FolderSource, model: Path, text: str) -> None:
    shard(model)
    write(model / "model.safetensors.index.json", text)
    with pytest.raises(SourceError, match=r"model\.safetensors\.index\.json is not an index of weights"):
        chosen(source, model)


def test_pickled_weights_are_left_out_when_there_are_safetensors(source: FolderSource, model: Path) -> None:
    write(model / "pytorch_model.bin", "pickled")
    write(model / "pytorch_model.bin.index.json")
    assert chosen(source, model) == {"config.json", "model.safetensors", "tokenizer.json"}


@pytest.mark.parametrize("foreign_file", [None, "optimizer.safetensors", "head.safetensors"])
def test_pickled_weights_are_chosen_when_transformers_would_load_them(
    source: FolderSource, model: Path, foreign_file: str | None
) -> None:
    weights = model / "model.safetensors"
    weights.rename(model / foreign_file) if foreign_file else weights.unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    assert chosen(source, model) == {"config.json", "pytorch_model.bin", "tokenizer.json"}


def test_foreign_weights_beside_the_models_are_left_out(source: FolderSource, model: Path) -> None:
    write(model / "optimizer.safetensors", "foreign")
    assert chosen(source, model) == {"config.json", "model.safetensors", "tokenizer.json"}


def test_weights_under_another_name_are_refused_by_that_name(source: FolderSource, model: Path) -> None:
    (model / "model.safetensors").rename(model / "weights.safetensors")
    with pytest.raises(SourceError, match=r"does not hold weights.*, got weights\.safetensors\."):
        chosen(source, model)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 cut off", b"version https://git-lfs.github.com/spec/v1"])
def test_damaged_pickled_weights_are_refused(source: FolderSource, model: Path, data: bytes) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(data)
    with pytest.raises(SourceError, match=r"pytorch_model\.bin is truncated or not a file of torch\.save"):
        chosen(source, model)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("instead", [False, True])
def test_adapter_beside_or_instead_of_weights_is_refused(
    source: FolderSource, model: Path, name: str, *, instead: bool
) -> None:
    write(model / name)
    if instead:
        (model / "model.safetensors").unlink()
        (model / "config.json").unlink()
    with pytest.raises(SourceError, match=f"holds a PEFT adapter: {name}") as caught:
        chosen(source, model)
    assert "merge_and_unload" in caught.value.hint


GOOD_JSON = b'{"model_type": "bert"}'


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "preprocessor_config.json",
        "1_Pooling/config.json",
    ],
)
@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"\xef\xbb\xbf" + GOOD_JSON, "is not JSON: Unexpected UTF-8 BOM"),
        (GOOD_JSON[:9], "is not JSON: Unterminated string"),
        (b"", "is empty"),
        (b"\xff\xfe{", "is not JSON: 'utf-8' codec"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "^Expected an object in NAME, got a list"),
        (b'"bert"', "^Expected an object in NAME, got a string"),
        (b"null", "^Expected an object in NAME, got null"),
    ],
)
def test_json_that_transformers_cannot_read_is_refused_by_name(
    source: FolderSource, model: Path, name: str, data: bytes, problem: str
) -> None:
    write(model / name)
    (model / name).write_bytes(data)
    with pytest.raises(SourceError, match=problem.replace("NAME", name)) as caught:
        chosen(source, model)
    assert name in caught.value.message


def test_json_that_nothing_reads_may_hold_anything(source: FolderSource, model: Path) -> None:
    # all-MiniLM-L6-v2 has this file.
    write(model / "data_config.json", '[{"name": "reddit.jsonl.gz", "lines": 10, "weight": 1}]')
    assert "config.json" in chosen(source, model)


def test_modules_json_is_a_list(source: FolderSource, model: Path) -> None:
    write(model / "modules.json", "[]")
    assert "modules.json" in chosen(source, model)
    write(model / "modules.json", "{}")
    with pytest.raises(SourceError, match=r"Expected a list in modules\.json, got an object"):
        chosen(source, model)


@pytest.mark.parametrize(
    "name",
    [
        "onnx/model.onnx",
        "onnx/config.json",
        "openvino/config.json",
        "checkpoint-500/config.json",
        "checkpoint-500/model.safetensors",
        "runs/config.json",
        ".git/config.json",
        "__pycache__/modeling.py",
        "a/b/config.json",
        "original/model.safetensors",
        "README.md",
        "training_args.bin",
        "optimizer.pt",
        "model.onnx",
    ],
)
def test_what_is_not_the_model_is_left_out(source: FolderSource, model: Path, name: str) -> None:
    write(model / name)
    assert chosen(source, model) == {"config.json", "model.safetensors", "tokenizer.json"}


@pytest.mark.parametrize(
    "name",
    [
        "1_Pooling/config.json",
        "added_tokens.json",
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
        "modeling_custom.py",
        "sentence_bert_config.json",
        "special_tokens_map.json",
        "spiece.model",
        "tokenizer_config.json",
        "vocab.txt",
    ],
)
def test_what_is_part_of_the_model_is_chosen(source: FolderSource, model: Path, name: str) -> None:
    write(model / name)
    assert name in chosen(source, model)


def test_file_that_vanishes_or_cannot_be_read_is_named(model: Path, tmp_path: Path) -> None:
    def vanish(line: str) -> None:
        (model / "config.json").unlink(missing_ok=True)

    settings = Settings(home=tmp_path / "home")
    with pytest.raises(SourceError, match=rf"^{model}/config\.json cannot be read: No such file or directory\. "):
        fetch_source(
            str(model), None, store_uri=(tmp_path / "store").as_uri(), settings=settings, on_progress=vanish
        )
    assert not (tmp_path / "store" / "manifests").exists()


@pytest.mark.parametrize("location", ["file://user:word@host/model", "file://host:80/model"])
def test_uri_of_another_machine_is_refused(location: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"is not the URI of a local folder\. Write it as file:///") as caught:
        FolderSource(Settings(home=tmp_path)).pin(location, None)
    assert "word" not in str(caught.value)
