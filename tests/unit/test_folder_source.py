from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from compileflow.errors import SourceError
from compileflow.settings import Settings
from compileflow.sources.files import check_weights
from compileflow.sources.folder import FolderSource
from compileflow.spec import HfTask
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
    check_weights(located.folder, located.files)
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


def test_uri_with_a_space_names_its_folder(source: FolderSource, model: Path) -> None:
    spaced = model.rename(model.with_name("my model"))
    assert source.locate(spaced.as_uri(), None, spaced).folder == spaced


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


def test_shard_outside_the_folder_is_absent(source: FolderSource, model: Path) -> None:
    (model / "model.safetensors").rename(model.parent / "outside.safetensors")
    shard_outside = {"weight_map": {"weight": "../outside.safetensors"}}
    write(model / "model.safetensors.index.json", json.dumps(shard_outside))
    save_file({"weight": np.zeros(10, dtype=np.float32)}, model / "model-00001-of-00002.safetensors")
    with pytest.raises(SourceError, match=r"names the shard \.\./outside\.safetensors, which is missing"):
        chosen(source, model)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": {}}}'])
def test_broken_index_is_named(source: FolderSource, model: Path, text: str) -> None:
    write(model / "model.safetensors.index.json", text)
    with pytest.raises(SourceError, match=r"model\.safetensors\.index\.json is not an index of weights"):
        chosen(source, model)


def test_pickled_weights_are_left_out_when_there_are_safetensors(source: FolderSource, model: Path) -> None:
    write(model / "pytorch_model.bin", "pickled")
    write(model / "pytorch_model.bin.index.json")
    assert chosen(source, model) == {"config.json", "model.safetensors", "tokenizer.json"}


def test_pickled_weights_are_chosen_when_there_is_nothing_else(source: FolderSource, model: Path) -> None:
    (model / "model.safetensors").unlink()
    write(model / "pytorch_model.bin", "pickled")
    assert chosen(source, model) == {"config.json", "pytorch_model.bin", "tokenizer.json"}


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
