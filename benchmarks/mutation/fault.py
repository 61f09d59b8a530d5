"""Fault: one fault, where it is planted, and the gates that may name it; decorators that register faults."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.mutation.sources import Source
from benchmarks.mutation.surgery import (
    edit_json,
    edit_onnx,
    edit_openvino,
    edit_weights,
    reseal,
    take_interface_files,
    wrap_torchscript,
)
from compileflow.artifact.manifest import MANIFEST_NAME
from compileflow.catalog import get_target
from compileflow.contracts.digests import folder_digest, list_files
from compileflow.spec import CompileSpec, ComponentSpec, Precision, ShapeBucket
from compileflow.steps.build import build_artifact

Kind = Literal["weights", "graph", "run time", "interface file", "manifest", "bf16", "int8"]
Shape = tuple[int, int]
TEXT_BUCKETS = ((1, 16), (8, 64))
_BUCKETS: dict[str, tuple[Shape, ...]] = {
    "text": TEXT_BUCKETS,
    "image-text": TEXT_BUCKETS,
    "image": ((1, 1), (8, 1)),
    "audio": ((1, 16_000), (8, 48_000)),
}


@dataclass(frozen=True)
class Healthy:
    """The healthy compile that a fault is planted into.

    Attributes:
        source: Source model.
        target: Target.
        precision: Precision of the compile.
        buckets: Shape buckets of a target without dynamic axes; () for the usual ones.
    """

    source: Source
    target: str
    precision: Precision = Precision.FP32
    buckets: tuple[Shape, ...] = ()

    def request(self, source_dir: Path) -> dict[str, Any]:
        """Return the arguments of `build_artifact` without the folder to write."""
        task = self.source.hf_task
        is_dynamic = get_target(self.target).capabilities.dynamic_axes
        shapes = () if is_dynamic else self.buckets or _BUCKETS[task.modality]
        component = ComponentSpec(
            shape_buckets=tuple(ShapeBucket(batch_size=rows, sequence_length=length) for rows, length in shapes)
        )
        spec = CompileSpec(target=self.target, hf_task=task, precision=self.precision, components=(component,))
        return {
            "source_dir": str(source_dir),
            "spec": spec.model_dump(mode="json"),
            "source": {
                "uri": source_dir.as_uri(),
                "revision": "0" * 64,
                "digest": folder_digest(list_files(source_dir)),
            },
            "threads": 1,
            "calibration": None,
        }


@dataclass(frozen=True)
class Planting:
    """Folders of one planting.

    Attributes:
        healthy: Description of the healthy compile.
        source_dir: Folder of the source model.
        healthy_dir: Folder of the healthy compile. Do not write to it.
        artifact_dir: Folder of the faulty artifact: absent before the planting.
        work_dir: Empty folder.
    """

    healthy: Healthy
    source_dir: Path
    healthy_dir: Path
    artifact_dir: Path
    work_dir: Path


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: Name of the fault in words.
        kind: Part of the artifact that is at fault.
        healthy: Compile that the fault is planted into.
        gates: Gates that may name the verdict, or classes of errors with which the artifact may be refused.
        plant: Writes the faulty artifact.
    """

    name: str
    kind: Kind
    healthy: Healthy
    gates: tuple[str, ...]
    plant: Callable[[Planting], None]


FAULTS: dict[str, Fault] = {}


def register(
    kind: Kind, healthy: Healthy, gates: tuple[str, ...], name: str, plant: Callable[[Planting], None]
) -> None:
    """Add a fault to the list."""
    if name in FAULTS:
        raise ValueError(f"two faults are called {name!r}")
    FAULTS[name] = Fault(name, kind, healthy, gates, plant)


Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def name_of(function: Callable[..., Any]) -> str:
    """Return the name of a fault's function in words."""
    return function.__name__.strip("_").replace("_", " ")


def in_weights(healthy: Healthy, *gates: str, kind: Kind = "weights") -> Decorator:
    """Register a function that edits the weights of the source model before the compile."""
    return _in_source(healthy, gates, kind, edit_weights)


def in_config(healthy: Healthy, *gates: str, kind: Kind = "weights") -> Decorator:
    """Register a function that edits config.json before the compile; the artifact has the right file."""
    return _in_source(healthy, gates, kind, lambda folder, edit: edit_json(folder / "config.json", edit))


def _in_source(
    healthy: Healthy, gates: tuple[str, ...], kind: Kind, change: Callable[[Path, Callable[[Any], None]], None]
) -> Decorator:
    def decorate(edit: Callable[[Any], None]) -> Callable[[Any], None]:
        def plant(planting: Planting) -> None:
            edited_dir = Path(shutil.copytree(planting.source_dir, planting.work_dir / "source"))
            change(edited_dir, edit)
            planting.artifact_dir.mkdir()
            request = healthy.request(planting.source_dir) | {"source_dir": str(edited_dir)}
            build_artifact(request | {"out_dir": str(planting.artifact_dir)})
            take_interface_files(planting.source_dir, planting.artifact_dir)
            reseal(planting.artifact_dir)

        register(kind, healthy, gates, name_of(edit), plant)
        return edit

    return decorate


def _in_artifact(
    kind: Kind,
    healthy: Healthy,
    gates: tuple[str, ...],
    change: Callable[[Path, Callable[..., Any]], None],
) -> Decorator:
    def decorate(edit: Callable[..., Any]) -> Callable[..., Any]:
        def plant(planting: Planting) -> None:
            shutil.copytree(planting.healthy_dir, planting.artifact_dir)
            change(planting.artifact_dir, edit)
            reseal(planting.artifact_dir)

        register(kind, healthy, gates, name_of(edit), plant)
        return edit

    return decorate


def in_onnx(healthy: Healthy, *gates: str, kind: Kind = "graph") -> Decorator:
    """Register a function that edits an onnx.ModelProto."""
    return _in_artifact(kind, healthy, gates, edit_onnx)


def in_openvino(healthy: Healthy, *gates: str, kind: Kind = "graph") -> Decorator:
    """Register a function that edits an openvino.Model."""
    return _in_artifact(kind, healthy, gates, edit_openvino)


def in_torchscript(healthy: Healthy, *gates: str, kind: Kind = "run time") -> Decorator:
    """Register a function from a bucket's graph, its rows and its length to the module that takes its place."""
    return _in_artifact(kind, healthy, gates, wrap_torchscript)


def in_file(path: str, healthy: Healthy, *gates: str) -> Decorator:
    """Register a function that edits the content of a JSON file of the artifact."""
    return _in_artifact("interface file", healthy, gates, lambda folder, edit: edit_json(folder / path, edit))


def in_manifest(healthy: Healthy, *gates: str, kind: Kind = "manifest") -> Decorator:
    """Register a function that edits the manifest; the digests of the files stay right."""
    return _in_artifact(kind, healthy, gates, lambda folder, edit: edit_json(folder / MANIFEST_NAME, edit))


def component_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the component of a manifest."""
    component: dict[str, Any] = manifest["components"]["default"]
    return component
