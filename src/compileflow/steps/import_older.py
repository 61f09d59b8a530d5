"""import_older: turn a pipeline that the older library saved into an artifact, and prove it."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from compileflow._process.folders import os_errors, work_folder
from compileflow._process.run_in_child import run_in_child
from compileflow.artifact.manifest import ORIGINAL_FOLDER
from compileflow.catalog import get_target, open_store
from compileflow.contracts.digests import list_files
from compileflow.serving.older_folder import check_pipeline, load_graph, open_older
from compileflow.settings import Settings
from compileflow.sources.files import kind_of
from compileflow.spec import ShapeBucket
from compileflow.steps.fetch import fetch_source
from compileflow.steps.request import StepTimeouts
from compileflow.steps.validate import validate_artifact
from compileflow.steps.values import CompiledArtifact, FetchedSource, ValidatedArtifact
from compileflow.targets._vendor.buckets import bucket_file
from compileflow.targets.torchscript import GRAPH_FILE, bucket_attribute
from compileflow.validation.settings import ValidationSettings

logger = logging.getLogger(__name__)
_CHILD = "compileflow.steps.import_older:convert"


def import_older(
    folder: Path,
    *,
    settings: Settings,
    validation: ValidationSettings | None = None,
    on_progress: Callable[[str], None] = logger.info,
) -> tuple[CompiledArtifact, ValidatedArtifact]:
    """Store a pipeline of the older library as an artifact, and validate it against the uncompiled pipeline in it.

    The artifact holds the traced model as it is; nothing is compiled again.

    Args:
        folder: Folder that the older library's CompiledPipeline.save_pretrained wrote.
        settings: The store, the work folder and the threads.
        validation: How the artifact is validated. None: the defaults.
        on_progress: Called with one line for each stage.

    Raises:
        SourceError: The folder is not such a pipeline, or the uncompiled pipeline in it is incomplete.
        LoadError: The traced model cannot run here.
        MeasurementError: The two models could not be compared.
    """
    folder = folder.expanduser().absolute()
    check_pipeline(folder)
    store_uri = settings.resolved_store_uri()
    source = fetch_source(
        str(folder / ORIGINAL_FOLDER), None, store_uri=store_uri, settings=settings, on_progress=on_progress
    )
    artifact = _store_artifact(folder, source, store_uri, settings, on_progress)
    validated = validate_artifact(
        source,
        artifact,
        validation or ValidationSettings(),
        store_uri=store_uri,
        settings=settings,
        timeout_s=StepTimeouts().validate_s,
        on_progress=on_progress,
    )
    return artifact, validated


def convert(request: dict[str, Any]) -> dict[str, Any]:
    """Write the files of the artifact. Runs in a child process, because the traced model is native code.

    Args:
        request: "folder" of the older library, "out_dir" of the artifact, and the record of the "source".
    """
    out_dir = Path(request["out_dir"])
    older = open_older(Path(request["folder"]))
    (record,) = older.manifest.components.values()
    graph_folder = out_dir / "components" / "default"
    graph_folder.mkdir(parents=True)
    target = get_target(older.manifest.target.name)
    (bucket,) = record.shape_buckets
    names = [tensor.name for tensor in record.outputs]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit\..*deprecated.*")
        _save(_with_tuple(load_graph(older.folder, target.name), names), bucket, graph_folder, target.name)
    for place, kinds in ((older.folder, ("config",)), (older.tokenizer_folder, ("tokenizer",))):
        for file in list_files(place) if place.is_dir() else ():
            if kind_of(file.path) in kinds:
                shutil.copyfile(place / file.path, out_dir / file.path)
    options = target.Options.model_fields.keys()
    spec = older.manifest.spec
    known = {name: value for name, value in spec.target_options.items() if name in options}
    load_options = {"dynamic_batch_size": False} if target.name == "neuron" else {}
    older.manifest.model_copy(
        update={
            "spec": spec.model_copy(update={"target_options": known}),
            "source": older.manifest.source.model_copy(update=request["source"]),
            "target": older.manifest.target.model_copy(update={"toolchain": target.toolchain()}),
            "components": {
                "default": record.model_copy(update={"folder": "components/default", "load_options": load_options})
            },
            "files": list_files(out_dir),
        }
    ).write(out_dir)
    return {}


def _store_artifact(
    folder: Path, source: FetchedSource, store_uri: str, settings: Settings, on_progress: Callable[[str], None]
) -> CompiledArtifact:
    store = open_store(store_uri, settings)
    with work_folder(settings.work_dir, label="import") as work:
        out_dir = work / "artifact"
        with os_errors(out_dir, "write to"):
            out_dir.mkdir()
        child = run_in_child(
            _CHILD,
            {
                "folder": str(folder),
                "out_dir": str(out_dir),
                "source": {"uri": source.uri, "revision": source.revision, "digest": source.digest},
            },
            work_dir=work,
            log_path=settings.log_path(f"import-{source.digest[:12]}"),
            timeout_s=StepTimeouts().compile_s,
            threads=settings.threads,
            on_progress=on_progress,
        )
        stored_folder = store.put_folder(out_dir)
    return CompiledArtifact(
        uri=stored_folder.uri,
        digest=stored_folder.digest,
        # Nothing was compiled, so no request has this key.
        cache_key=stored_folder.digest,
        size_bytes=stored_folder.size_bytes,
        compile_duration_s=0.0,
        peak_rss_bytes=child.peak_rss_bytes,
        cached=False,
        why=f"imported from {folder}",
    )


def _with_tuple(graph: Any, names: Sequence[str]) -> Any:
    """Wrap a traced model that may return a dict: graphs of the targets return a tuple in a fixed order."""
    (returned,) = graph.forward.graph.outputs()
    result = {
        "DictType": f"({', '.join(f'answer[{name!r}]' for name in names)},)",
        "TensorType": "(answer,)",
    }.get(returned.type().kind(), "answer")
    module = _scripted(traced=graph)
    module.define(
        "def forward(self, input_ids, attention_mask):\n"
        "    answer = self.traced(input_ids, attention_mask)\n"
        f"    return {result}\n"
    )
    return module


def _scripted(**modules: Any) -> Any:
    """Return a script module that holds other script modules by name."""
    import torch

    class Holder(torch.nn.Module):
        """Holds modules."""

    holder = Holder()
    for name, module in modules.items():
        setattr(holder, name, module)
    return torch.jit.script(holder)


def _save(graph: Any, bucket: ShapeBucket, folder: Path, target_name: str) -> None:
    """Save a graph in the layout of its target."""
    import torch

    if target_name == "neuron":
        torch.jit.save(graph, str(folder / bucket_file(bucket)))
    else:
        torch.jit.save(_scripted(**{bucket_attribute(bucket): graph}), str(folder / GRAPH_FILE))
