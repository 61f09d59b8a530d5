"""Edits of source models and of compiled artifacts, as a faulty compiler or a careless hand would make them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compileflow.artifact.manifest import MANIFEST_NAME, read_manifest
from compileflow.contracts.digests import list_files
from compileflow.sources.files import kind_of

Weights = dict[str, Any]
GRAPH_FOLDER = Path("components", "default")


def edit_weights(source_dir: Path, edit: Callable[[Weights], None]) -> None:
    """Edit the weights of a source model; `edit` changes a dict of tensors by name."""
    from safetensors.torch import load_file, save_file

    path = source_dir / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(weights)
    save_file(weights, path, metadata={"format": "pt"})


def edit_json(path: Path, edit: Callable[[Any], None]) -> None:
    """Edit a JSON file; `edit` changes its content."""
    content = json.loads(path.read_text("utf-8"))
    edit(content)
    path.write_text(json.dumps(content, ensure_ascii=False), "utf-8")


def take_interface_files(source_dir: Path, artifact_dir: Path) -> None:
    """Copy the interface files of a source model over those of an artifact."""
    for record in list_files(source_dir):
        if kind_of(record.path) in ("config", "tokenizer", "code"):
            shutil.copyfile(source_dir / record.path, artifact_dir / record.path)


def reseal(artifact_dir: Path) -> None:
    """Rewrite the digests of the manifest, so that the edited files are those that it promises."""
    manifest = read_manifest(artifact_dir)
    (artifact_dir / MANIFEST_NAME).unlink()
    manifest.model_copy(update={"files": list_files(artifact_dir)}).write(artifact_dir)


def edit_onnx(artifact_dir: Path, edit: Callable[[Any], None]) -> None:
    """Edit an ONNX graph; `edit` changes an onnx.ModelProto."""
    import onnx

    path = artifact_dir / GRAPH_FOLDER / "model.onnx"
    model = onnx.load(str(path))
    data = path.with_name("model.onnx.data")
    data.unlink(missing_ok=True)
    edit(model)
    onnx.save(model, str(path), save_as_external_data=True, location=data.name, size_threshold=1024)
    # The manifest of a compile lists the file even if it is empty.
    data.touch()


def edit_openvino(artifact_dir: Path, edit: Callable[[Any], None]) -> None:
    """Edit an OpenVINO model; `edit` changes an openvino.Model."""
    import openvino

    path = artifact_dir / GRAPH_FOLDER / "model.xml"
    model = openvino.Core().read_model(str(path))
    edit(model)
    model.validate_nodes_and_infer_types()
    edited = path.with_name("edited.xml")
    openvino.save_model(model, str(edited), compress_to_fp16=False)
    # The model maps its file of weights into memory as long as it lives.
    del model
    for suffix in (".xml", ".bin"):
        edited.with_suffix(suffix).replace(path.with_suffix(suffix))


def wrap_torchscript(artifact_dir: Path, wrap: Callable[[Any, int, int], Any]) -> None:
    """Replace each shape bucket's graph; `wrap` gets a graph, its rows and its length, and returns a module."""
    import torch

    path = artifact_dir / GRAPH_FOLDER / "model.pt"
    buckets = torch.jit.load(str(path))
    holder = torch.nn.Module()
    for name, graph in buckets.named_children():
        rows, length = map(int, name.removeprefix("bucket_").split("x"))
        holder.add_module(name, wrap(graph, rows, length))
    torch.jit.save(torch.jit.script(holder), str(path))
