"""Malformed artifacts: a load ends in one line or in a working pipeline, in bounded time and memory.

Hypothesis draws files that differ from those of a sound artifact. Their digests agree with the manifest, as they
would in an artifact that a stranger made.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compileflow import CompiledPipeline, CompiledTokenizer
from compileflow.artifact.manifest import read_manifest
from compileflow.artifact.verify import verify_artifact
from compileflow.cli.inspect import inspect
from compileflow.cli.verify import verify
from compileflow.errors import CompileflowError, LoadError
from compileflow.settings import get_settings
from compileflow.source_model.sentence_modules import read_recipe
from tests.unit.malformed import ESCAPES, malformed, reseal

SOUND = Path(__file__).parents[1] / "artifacts" / "v1-torchscript"
LONGEST_S = 5.0
MOST_BYTES = 1500 * 2**20
TEXTS = ["the end", "it is a long day and the night"]
SETTINGS_FILE = "tokenization_settings.json"
SOUND_SETTINGS = {"padding": "max_length", "truncation": True, "max_length": 32, "add_special_tokens": True}
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


def sound(name: str) -> Any:
    return json.loads((SOUND / name).read_text("utf-8"))


def examples(count: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def copy_to(tmp_path: Path) -> Path:
    folder = tmp_path / "artifact"
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(SOUND, folder))


def ends_well(call: Callable[[], object]) -> None:
    """Call, and accept an error of compileflow in one line of plain text; every other error fails the test."""
    start, peak = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    text = ""
    try:
        call()
    except CompileflowError as error:
        text = str(error)
    assert text.isprintable()
    assert len(text) < 5000
    assert time.monotonic() - start < LONGEST_S
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < MOST_BYTES


@pytest.fixture(scope="module", autouse=True)
def libraries() -> None:
    """Import torch and transformers before the first load is timed."""
    load_and_call(SOUND)


def load_and_call(folder: Path) -> None:
    pipeline = CompiledPipeline.from_pretrained(folder)
    pipeline(TEXTS[0])
    pipeline(TEXTS)


@examples(150)
@given(data=malformed(sound("manifest.json")))
def test_malformed_manifest(tmp_path: Path, data: bytes) -> None:
    folder = copy_to(tmp_path)
    (folder / "manifest.json").write_bytes(data)
    ends_well(lambda: load_and_call(folder))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_malformed_file_of_transformers(tmp_path: Path, name: str) -> None:
    @examples(20)
    @given(data=malformed(sound(name)))
    def check(data: bytes) -> None:
        folder = copy_to(tmp_path)
        (folder / name).write_bytes(data)
        reseal(folder, name)
        ends_well(lambda: load_and_call(folder))

    check()


@examples(50)
@given(data=malformed(SOUND_SETTINGS))
def test_malformed_tokenization_settings(tmp_path: Path, data: bytes) -> None:
    folder = copy_to(tmp_path)
    (folder / SETTINGS_FILE).write_bytes(data)
    reseal(folder, SETTINGS_FILE)
    ends_well(lambda: CompiledTokenizer.from_pretrained(folder)(TEXTS))


@examples(15)
@given(data=malformed({"unk_token": "[UNK]", "pad_token": {"content": "[PAD]"}, "extra_special_tokens": ["<x>"]}))
def test_malformed_map_of_special_tokens(tmp_path: Path, data: bytes) -> None:
    folder = copy_to(tmp_path)
    (folder / "special_tokens_map.json").write_bytes(data)
    reseal(folder, "special_tokens_map.json")
    ends_well(lambda: CompiledTokenizer.from_pretrained(folder)(TEXTS))


@examples(60)
@given(modules=malformed(MODULES), pooling=malformed({"pooling_mode_mean_tokens": True, "include_prompt": True}))
def test_malformed_modules_of_sentence_transformers(tmp_path: Path, modules: bytes, pooling: bytes) -> None:
    (tmp_path / "1_Pooling").mkdir(exist_ok=True)
    (tmp_path / "modules.json").write_bytes(modules)
    (tmp_path / "1_Pooling" / "config.json").write_bytes(pooling)
    ends_well(lambda: read_recipe(tmp_path))
    (tmp_path / "modules.json").write_text(json.dumps(MODULES), "utf-8")
    ends_well(lambda: read_recipe(tmp_path))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_missing_file_of_transformers(tmp_path: Path, name: str) -> None:
    folder = copy_to(tmp_path)
    data = sound("manifest.json")
    data["files"] = [record for record in data["files"] if record["path"] != name]
    (folder / "manifest.json").write_text(json.dumps(data), "utf-8")
    (folder / name).unlink()
    ends_well(lambda: load_and_call(folder))


PATHS = st.sampled_from(
    ["", ".", "..", "../x", "/etc/passwd", "a/../../b", "C:\\x", "a\0b", "\ud800", ESCAPES, "a" * 999]
)


@examples(20)
@given(path=PATHS | st.text(max_size=8), place=st.sampled_from(["files", "folder", "output_class"]))
def test_names_in_a_manifest_stay_in_its_folder(tmp_path: Path, path: str, place: str) -> None:
    folder = copy_to(tmp_path)
    data = sound("manifest.json")
    if place == "files":
        data["files"].append({"path": path, "size_bytes": 0, "sha256": "0" * 64})
    else:
        data["components"]["default"][place] = path
    (folder / "manifest.json").write_text(json.dumps(data), "utf-8")
    with pytest.raises(CompileflowError) as caught:
        load_and_call(folder)
    assert str(caught.value).isprintable()


SPECIAL_FILES: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "link out": lambda path: path.symlink_to("/etc/hostname"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("kind", SPECIAL_FILES)
@pytest.mark.parametrize("name", ["manifest.json", "config.json", "extra.json", "attestations.intoto.jsonl"])
def test_special_file_in_the_folder_is_refused_at_once(tmp_path: Path, name: str, kind: str) -> None:
    folder = copy_to(tmp_path)
    (folder / name).unlink(missing_ok=True)
    SPECIAL_FILES[kind](folder / name)
    ends_well(lambda: load_and_call(folder))
    ends_well(lambda: verify_artifact(folder, settings=get_settings()))
    # An empty folder holds nothing.
    if kind != "folder":
        with pytest.raises(CompileflowError):
            load_and_call(folder)


@pytest.mark.parametrize("value", [4096, {"batch_size": 4096, "sequence_length": 10_000_000}])
def test_huge_shape_buckets_are_refused_at_once(tmp_path: Path, value: Any) -> None:
    folder = copy_to(tmp_path)
    data = sound("manifest.json")
    data["components"]["default"]["shape_buckets"] = [value] * 20_000
    (folder / "manifest.json").write_text(json.dumps(data), "utf-8")
    ends_well(lambda: load_and_call(folder))
    with pytest.raises(CompileflowError, match="shape_buckets"):
        read_manifest(folder)


@pytest.mark.parametrize("labels", [{}, {"0": "a"}, {"0": "a", "1": "b", "5": "c"}])
def test_configuration_that_names_too_few_classes_is_refused(tmp_path: Path, labels: dict[str, str]) -> None:
    folder = copy_to(tmp_path)
    (folder / "config.json").write_text(json.dumps(sound("config.json") | {"id2label": labels}), "utf-8")
    reseal(folder, "config.json")
    with pytest.raises(LoadError, match=r"returns 3 classes, but config\.json names|cannot use the files"):
        CompiledPipeline.from_pretrained(folder)


def test_control_characters_of_a_manifest_are_shown_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_to(tmp_path)
    data = sound("manifest.json")
    data["source"]["uri"] += ESCAPES
    data["target"]["toolchain"][f"torch{ESCAPES}"] = "1"
    (folder / "manifest.json").write_text(json.dumps(data), "utf-8")
    inspect(str(folder))
    data[ESCAPES] = 1
    (folder / "manifest.json").write_text(json.dumps(data), "utf-8")
    for command in (inspect, verify):
        with pytest.raises(typer.Exit):
            command(str(folder))
    captured = capsys.readouterr()
    text = captured.out + captured.err
    assert "\\x1b[2J\\x1b]0;title\\x07\\u202e" in text
    assert not {"\x1b", "\x07", "\u202e"} & set(text)
