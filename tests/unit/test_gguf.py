"""A GGUF file is a source model: it is converted once, and what cannot be converted is refused at first sight."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from compileflow.errors import MissingPackageError, SourceError
from compileflow.settings import Settings
from compileflow.sources import gguf_file
from compileflow.sources.folder import FolderSource


def write_gguf(path: Path, kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    _, size = gguf.GGML_QUANT_SIZES[kind]
    writer.add_tensor("token_embd.weight", np.zeros((4, size), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def source(settings: Settings) -> FolderSource:
    return FolderSource(settings)


def test_weights_and_version_of_transformers_are_the_revision(
    source: FolderSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "model.gguf")
    uri, revision = source.pin(str(path), None)
    assert uri == path.as_uri()
    assert source.pin(uri, revision) == (uri, revision)
    path.write_bytes(path.read_bytes() + b"\0")
    _, other_weights = source.pin(str(path), None)
    monkeypatch.setattr(gguf_file, "installed_versions", lambda names: dict.fromkeys(names, "9.9.9"))
    assert len({revision, other_weights, source.pin(str(path), None)[1]}) == 3


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty.gguf is truncated or not GGUF (0 bytes)"),
        (b"not a model", "text.gguf is truncated or not GGUF (11 bytes): GGUF magic invalid"),
    ],
    ids=["empty", "text"],
)
def test_other_file_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / reason.partition(" ")[0]
    path.write_bytes(content)
    with pytest.raises(SourceError) as caught:
        gguf_file.check_gguf(path)
    assert reason in str(caught.value)


def test_quantization_without_a_converter_is_refused_by_name(tmp_path: Path) -> None:
    gguf_file.check_gguf(write_gguf(tmp_path / "good.gguf"))
    path = write_gguf(tmp_path / "model.gguf", gguf.GGMLQuantizationType.Q8_K)
    with pytest.raises(SourceError, match=r"model\.gguf holds weights of the quantization Q8_K") as caught:
        gguf_file.check_gguf(path)
    assert "original checkpoint" in str(caught.value)


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file, "installed_versions", lambda names: {"accelerate": "1.15.0"})
    with pytest.raises(MissingPackageError, match=r"needs gguf, which is not installed.*compileflow\[gguf\]"):
        gguf_file.check_gguf(tmp_path / "model.gguf")


def test_file_has_no_revision(source: FolderSource, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf")
    with pytest.raises(SourceError, match="is a file, and a file has no revision 'main'"):
        source.pin(str(path), "main")
