"""The manifest: its checks, and the comparison of an artifact with it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compileflow.artifact.manifest import (
    MANIFEST_NAME,
    ArtifactManifest,
    SourceRecord,
    TargetRecord,
    read_manifest,
    verify_folder,
)
from compileflow.artifact.open import open_artifact
from compileflow.contracts import ComponentRecord, TensorRecord
from compileflow.contracts.digests import folder_digest, list_files
from compileflow.errors import IntegrityError, LoadError, ManifestError
from compileflow.spec import CompileSpec, HfTask

TORCHSCRIPT = {"spec": {"target": "torchscript"}, "target": {"name": "torchscript"}}


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "artifact"
    (folder / "default").mkdir(parents=True)
    (folder / "default" / "model.onnx").write_bytes(b"graph" * 1000)
    (folder / "config.json").write_text("{}")
    tensor = TensorRecord(name="input_ids", dtype="int64", axes=("batch", "sequence"))
    ArtifactManifest(
        spec=CompileSpec(target="onnx-runtime", hf_task=HfTask.TEXT_CLASSIFICATION),
        source=SourceRecord(uri="hf://a/b", revision="c" * 40, digest="5" * 64, architecture="BertModel"),
        target=TargetRecord(name="onnx-runtime", version=1, toolchain={"onnx": "1.21"}),
        components={
            "default": ComponentRecord(
                folder="default",
                inputs=(tensor,),
                outputs=(tensor,),
                output_class="transformers.modeling_outputs:SequenceClassifierOutput",
                max_sequence_length=64,
                dynamic_axes=True,
            )
        },
        files=list_files(folder),
    ).write(folder)
    return folder


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / MANIFEST_NAME
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_whole_artifact_passes(artifact: Path) -> None:
    manifest, files = verify_folder(artifact)
    assert manifest == read_manifest(artifact)
    assert manifest.hf_task is HfTask.TEXT_CLASSIFICATION
    assert manifest.size_bytes == 5002
    assert folder_digest(files) == folder_digest(list_files(artifact))


def test_missing_load_option_is_named(artifact: Path) -> None:
    record = read_manifest(artifact).components["default"].model_copy(update={"load_options": {"device": "cpu"}})
    assert record.load_option("device") == "cpu"
    with pytest.raises(LoadError, match="lacks the entry 'performance_hint'"):
        record.load_option("performance_hint")


def test_same_manifest_is_written_as_the_same_bytes(artifact: Path) -> None:
    original = (artifact / MANIFEST_NAME).read_bytes()
    read_manifest(artifact).write(artifact)
    assert (artifact / MANIFEST_NAME).read_bytes() == original


@pytest.mark.parametrize("version", [0, 4, "1", None, True, 3.0, [3]])
def test_unknown_schema_version_is_refused_before_anything_else(artifact: Path, version: object) -> None:
    edit(artifact, lambda data: data.update(schema_version=version, unknown_field=1))
    with pytest.raises(ManifestError, match=re.escape(f"expected schema_version 1, 2, 3, found {version!r}")):
        verify_folder(artifact)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff", "[" * 100_000])
def test_file_that_is_not_a_manifest_is_refused(artifact: Path, text: str) -> None:
    (artifact / MANIFEST_NAME).write_bytes(text.encode("latin-1"))
    with pytest.raises(ManifestError, match=r"manifest\.json"):
        read_manifest(artifact)


def test_absent_manifest_is_refused(artifact: Path) -> None:
    with pytest.raises(ManifestError, match="is not a folder"):
        read_manifest(artifact / "config.json")
    (artifact / MANIFEST_NAME).unlink()
    with pytest.raises(ManifestError, match=r"has no manifest\.json"):
        read_manifest(artifact)


def test_wrong_field_is_named(artifact: Path) -> None:
    edit(artifact, lambda data: data["target"].update(version=0))
    with pytest.raises(ManifestError, match=r"target\.version"):
        read_manifest(artifact)


def test_unknown_field_is_refused(artifact: Path) -> None:
    edit(artifact, lambda data: data["source"].update(branch="main"))
    with pytest.raises(ManifestError, match=r"source\.branch"):
        read_manifest(artifact)


def test_missing_file_is_refused(artifact: Path) -> None:
    (artifact / "default" / "model.onnx").unlink()
    with pytest.raises(IntegrityError, match=r"default/model\.onnx is missing"):
        verify_folder(artifact)


@pytest.mark.parametrize("body", [b"graph" * 999 + b"grapH", b"graph", b""])
def test_altered_file_is_refused(artifact: Path, body: bytes) -> None:
    (artifact / "default" / "model.onnx").write_bytes(body)
    with pytest.raises(IntegrityError, match=r"default/model\.onnx was altered"):
        verify_folder(artifact)


def test_unlisted_file_is_refused(artifact: Path) -> None:
    (artifact / "default" / "plugin.py").write_text("raise SystemExit")
    with pytest.raises(IntegrityError, match=r"default/plugin\.py is not in the manifest"):
        verify_folder(artifact)


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "..\\x", "default/../../x"])
def test_file_outside_the_folder_is_refused(artifact: Path, path: str) -> None:
    (artifact.parent / "x").write_bytes(b"graph" * 1000)
    edit(artifact, lambda data: data["files"][1].update(path=path))
    for read in (read_manifest, verify_folder):
        with pytest.raises(IntegrityError, match=r"files\.1\.path.*leaves its folder"):
            read(artifact)


@pytest.mark.parametrize("folder", ["..", "/", "a\\b"])
def test_component_outside_the_folder_is_refused(artifact: Path, folder: str) -> None:
    edit(artifact, lambda data: data["components"]["default"].update(folder=folder))
    with pytest.raises(IntegrityError, match="leaves its folder"):
        read_manifest(artifact)


def test_link_out_of_the_folder_is_refused_even_to_the_same_bytes(artifact: Path) -> None:
    model = artifact / "default" / "model.onnx"
    model.rename(artifact.parent / "outside.onnx")
    model.symlink_to(artifact.parent / "outside.onnx")
    with pytest.raises(IntegrityError, match="link out of the folder"):
        verify_folder(artifact)


def test_file_listed_twice_is_refused(artifact: Path) -> None:
    edit(artifact, lambda data: data["files"].append(data["files"][0]))
    with pytest.raises(ManifestError, match=r"files: config\.json is listed 2 times\. Fetch"):
        verify_folder(artifact)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"pad_token_id": -1}, r"pad_token_id: expected at least 0"),
        ({"pad_token_id": 144, "vocab_size": 144}, "pad_token_id is 144, but the model takes token ids below 144"),
        ({"pad_token_id": 2**31, "vocab_size": 144}, "pad_token_id: expected less than"),
    ],
    ids=str,
)
def test_padding_token_that_the_model_lacks_is_refused(
    artifact: Path, values: dict[str, int], problem: str
) -> None:
    edit(artifact, lambda data: data["components"]["default"].update(values))
    with pytest.raises(ManifestError, match=problem):
        read_manifest(artifact)


def test_padding_token_of_the_model_is_accepted(artifact: Path) -> None:
    for values in ({"pad_token_id": 143, "vocab_size": 144}, {"pad_token_id": 200, "vocab_size": 0}):
        edit(artifact, lambda data, values=values: data["components"]["default"].update(values))
        assert read_manifest(artifact).components["default"].pad_token_id == values["pad_token_id"]


def test_free_shapes_on_a_target_with_fixed_ones_are_refused_at_the_load(artifact: Path) -> None:
    edit(artifact, lambda data: [data[name].update(change) for name, change in TORCHSCRIPT.items()])
    opened = open_artifact(artifact)
    with pytest.raises(ManifestError, match="dynamic_axes is true, but torchscript compiles fixed shapes only"):
        opened.load(opened.component("default"), device=None, threads=None)
