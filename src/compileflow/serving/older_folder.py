"""Folders that the older library saved: open them as artifacts without a verdict.

A pipeline has `pipeline/`, `compiled_tokenizer/`, `compiled_model/` and `pipeline_task.json`. A model alone is a
folder like `compiled_model/`: `config.json`, the traced `model.pt`, and `compilation_specs.json`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import numpy as np

from compileflow.artifact.attestations.require_signature import RequireSignature, requires_signature
from compileflow.artifact.manifest import (
    MANIFEST_NAME,
    ORIGINAL_FOLDER,
    ArtifactManifest,
    SourceRecord,
    TargetRecord,
)
from compileflow.artifact.open import OpenArtifact, open_artifact, path_of
from compileflow.catalog import get_target
from compileflow.contracts import ComponentRecord, Device, Runner, TensorRecord
from compileflow.contracts.digests import folder_digest, list_files
from compileflow.contracts.json_files import read_json
from compileflow.errors import LoadError, SourceError, first_line
from compileflow.source_model.tasks import task_of_architecture
from compileflow.spec import CompileSpec, ComponentSpec, HfTask, ShapeBucket
from compileflow.targets._traced import TracedRunner

logger = logging.getLogger(__name__)
TASK_FILE = "pipeline_task.json"
GRAPH_FILE = "model.pt"
_SPECS_FILE = "compilation_specs.json"
_MODEL, _TOKENIZER = "compiled_model", "compiled_tokenizer"
# The older library traced with these two inputs, in this order.
_INPUTS = tuple(
    TensorRecord(name=name, dtype="int64", axes=("batch", "sequence")) for name in ("input_ids", "attention_mask")
)
# Output class of each task, and the names of outputs of a graph that returns a tuple.
_OUTPUTS: Mapping[HfTask, tuple[str, tuple[str, ...]]] = {
    HfTask.FEATURE_EXTRACTION: ("BaseModelOutputWithPooling", ("last_hidden_state", "pooler_output")),
    HfTask.TEXT_CLASSIFICATION: ("SequenceClassifierOutput", ("logits",)),
    HfTask.TOKEN_CLASSIFICATION: ("TokenClassifierOutput", ("logits",)),
    HfTask.FILL_MASK: ("MaskedLMOutput", ("logits",)),
    HfTask.QUESTION_ANSWERING: ("QuestionAnsweringModelOutput", ("start_logits", "end_logits")),
}


@dataclass(frozen=True)
class OlderArtifact(OpenArtifact):
    """A folder of the older library behind the interface of an artifact.

    Attributes:
        root: Folder of the pipeline; for a model alone, the folder of the model.
    """

    root: Path = Path()

    @property
    def saved_folder(self) -> Path:
        """Folder with all files."""
        return self.root

    @property
    def tokenizer_folder(self) -> Path:
        """Folder with the tokenizer and its settings."""
        return self.root / _TOKENIZER

    def load(self, record: ComponentRecord, *, device: Device | None, threads: int | None) -> Runner:
        """Load the traced model.

        Raises:
            LoadError: It cannot run here.
        """
        graph = load_graph(self.folder, self.manifest.target.name)
        shape = record.shape_buckets[0].batch_size, record.shape_buckets[0].sequence_length
        return TracedRunner(
            {shape: lambda *tensors: tuple(_named(graph, tensors, ()).values())}, record, threads=threads
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(open_older, self.root, trust_remote_code=self.trust_remote_code), ()


def open_any(
    location: str | Path,
    *,
    digest: str | None = None,
    trust: bool = False,
    require_signature: RequireSignature = None,
    trust_remote_code: bool = False,
) -> OpenArtifact:
    """Open an artifact, or a folder of the older library with a warning in the log; see `open_artifact`.

    Raises:
        LoadError: The folder of the older library is incomplete or cannot run here.
    """
    folder = path_of(location).absolute()
    if digest is None and is_older(folder) and not requires_signature(require_signature):
        artifact = open_older(folder, trust_remote_code=trust_remote_code)
        logger.warning(
            "%s was saved by the older library and runs unproven: no verdict says that it answers like its source "
            "model. To prove it, run: compileflow import-older %s",
            artifact.root,
            artifact.root,
        )
        return artifact
    return open_artifact(
        location,
        digest=digest,
        trust=trust,
        require_signature=require_signature,
        trust_remote_code=trust_remote_code,
    )


def is_older(folder: Path) -> bool:
    """Return whether a folder is a pipeline or a model that the older library saved."""
    is_saved = (folder / _MODEL / _SPECS_FILE).is_file() or (folder / _SPECS_FILE).is_file()
    return is_saved and not (folder / MANIFEST_NAME).exists()


def check_pipeline(root: Path) -> None:
    """Check that a folder holds a whole pipeline of the older library, without loading its traced model.

    Raises:
        SourceError: The folder does not exist, or a file is missing or cannot be read.
    """
    hint = f"Give the folder that holds {ORIGINAL_FOLDER}, {_TOKENIZER}, {_MODEL} and {TASK_FILE}."
    if not root.is_dir():
        raise SourceError(f"{root} {'is not a folder' if root.exists() else 'does not exist'}.", hint=hint)
    names = [f"{_MODEL}/{name}" for name in (_SPECS_FILE, "config.json", GRAPH_FILE)]
    missing_names = [name for name in (*names, _TOKENIZER, ORIGINAL_FOLDER) if not (root / name).exists()]
    if missing_names or (root / MANIFEST_NAME).exists():
        problem = f"{missing_names[0]} is missing" if missing_names else f"with {MANIFEST_NAME}, it is an artifact"
        raise SourceError(f"{root} is not a pipeline that the older library saved: {problem}.", hint=hint)
    try:
        _read_header(root)
    except LoadError as error:
        raise SourceError(error.message, hint=error.hint) from error
    graph = root / _MODEL / GRAPH_FILE
    if not is_zipfile(graph):
        raise SourceError(
            f"{graph} is damaged, or not a file of torch.jit.save.",
            hint="Copy the folder of the older library again.",
        )


def open_older(root: Path, *, trust_remote_code: bool = False) -> OlderArtifact:
    """Read a folder of the older library, and run its traced model once to learn its outputs.

    Raises:
        LoadError: A file is missing or damaged, or the traced model cannot run here.
    """
    folder, config, task, bucket, specs = _read_header(root)
    architectures = config.get("architectures") or ["unknown"]
    target = "neuron" if specs.get("tracing__neuron") else "torchscript"
    options = dict(specs.get("tracing_kwargs") or {})
    output_class, names = _OUTPUTS[task.graph_task]
    pad_token_id = config.get("pad_token_id")
    graph = load_graph(folder, target)
    component = ComponentRecord(
        folder=_MODEL,
        inputs=_INPUTS,
        outputs=_outputs(graph, bucket, names, per_token=task is HfTask.QUESTION_ANSWERING),
        output_class=f"transformers.modeling_outputs:{output_class}",
        max_sequence_length=bucket.sequence_length,
        dynamic_axes=False,
        shape_buckets=(bucket,),
        # Configurations without a token may say -1.
        pad_token_id=pad_token_id if isinstance(pad_token_id, int) and pad_token_id >= 0 else 0,
    )
    tokenizer_files = list_files(root / _TOKENIZER) if (root / _TOKENIZER).is_dir() else ()
    digest = folder_digest(list_files(root))
    spec = ComponentSpec(max_sequence_length=bucket.sequence_length, shape_buckets=(bucket,))
    manifest = ArtifactManifest(
        spec=CompileSpec(target=target, hf_task=task, components=(spec,), target_options=options),
        source=SourceRecord(uri=root.as_uri(), revision=digest, digest=digest, architecture=architectures[0]),
        target=TargetRecord(name=target, version=get_target(target).version, toolchain={}),
        components={"default": component},
        files=tokenizer_files,
    )
    return OlderArtifact(folder, manifest, digest, verified=False, trust_remote_code=trust_remote_code, root=root)


def _read_header(root: Path) -> tuple[Path, dict[str, Any], HfTask, ShapeBucket, dict[str, Any]]:
    """Return the folder of the traced model, its configuration, task, shape and specs."""
    folder = root / _MODEL if (root / _MODEL).is_dir() else root
    specs = _read_object(folder / _SPECS_FILE)
    config = _read_object(folder / "config.json")
    task = _task(root, folder, config.get("architectures") or ["unknown"])
    try:
        bucket = ShapeBucket(batch_size=specs["tracing__batch_size"], sequence_length=specs["tracing__max_length"])
        dict(specs.get("tracing_kwargs") or {})
    except (KeyError, ValueError, TypeError) as error:
        raise LoadError(
            f"{folder / _SPECS_FILE} does not hold the shape of the traced model: {first_line(error)}.",
            hint="Expected tracing__batch_size and tracing__max_length, as the older library wrote them.",
        ) from error
    return folder, config, task, bucket, specs


def load_graph(folder: Path, target_name: str) -> Any:
    """Load the traced model of a folder with the runtime of its target.

    Raises:
        LoadError: The runtime is missing, or the file is missing or damaged.
    """
    target = get_target(target_name)
    availability = target.probe()
    if not availability.can_run:
        raise LoadError(
            f"{target.name} cannot run here: {availability.reason}.", hint=f"Try: {availability.hint}."
        )
    import torch

    try:
        if target_name == "neuron":
            # The import registers the operators of the graph.
            import_module("torch_neuron")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*torch\.jit\..*deprecated.*")
            return torch.jit.load(str(folder / GRAPH_FILE), map_location="cpu").eval()  # type: ignore[no-untyped-call]
    except Exception as error:
        raise LoadError(
            f"{folder / GRAPH_FILE} cannot be loaded with torch {torch.__version__}: {first_line(error)}.",
            hint=f"Compile the uncompiled pipeline again: {folder.parent / 'pipeline'}.",
        ) from error


def _named(graph: Any, tensors: Sequence[Any], names: Sequence[str]) -> dict[str, Any]:
    """Call a traced model and name its outputs, of which some older models returned a tuple or one tensor."""
    answer = graph(*tensors)
    if isinstance(answer, Mapping):
        return dict(answer)
    values = answer if isinstance(answer, tuple | list) else (answer,)
    return dict(zip(names or map(str, range(len(values))), values, strict=False))


def _outputs(
    graph: Any, bucket: ShapeBucket, names: Sequence[str], *, per_token: bool
) -> tuple[TensorRecord, ...]:
    import torch

    ones = torch.ones((bucket.batch_size, bucket.sequence_length), dtype=torch.int64)
    try:
        with torch.inference_mode():
            answer = _named(graph, (ones, ones), names)
    except RuntimeError as error:
        raise LoadError(
            f"The traced model cannot run at its shape {bucket}: {first_line(error)}.",
            hint="Compile its uncompiled pipeline again.",
        ) from error
    records = []
    for name, tensor in answer.items():
        sizes = tuple(np.asarray(tensor).shape)
        has_tokens = sizes[1:2] == (bucket.sequence_length,) and (per_token or len(sizes) > 2)
        axes = ("batch", "sequence", *sizes[2:]) if has_tokens else ("batch", *sizes[1:])
        records.append(TensorRecord(name=name, dtype=str(tensor.dtype).removeprefix("torch."), axes=axes))
    return tuple(records)


def _task(root: Path, folder: Path, architectures: Sequence[str]) -> HfTask:
    for place in (root, folder.parent):
        if (place / TASK_FILE).is_file():
            name = _read_object(place / TASK_FILE).get("task")
            break
    else:
        name = task_of_architecture(architectures[0])
    try:
        task = HfTask(str(name))
    except ValueError as error:
        raise LoadError(
            f"{root} has the task {name!r}, which compileflow does not serve.",
            hint=f"Write one of these tasks to {TASK_FILE} in that folder: {', '.join(_OUTPUTS)}.",
        ) from error
    if task.graph_task not in _OUTPUTS:
        raise LoadError(
            f"The older library did not compile {task.value}.", hint=f"It compiled: {', '.join(_OUTPUTS)}."
        )
    return task


def _read_object(path: Path) -> dict[str, Any]:
    try:
        data = read_json(path)
    except (OSError, ValueError) as error:
        raise LoadError(
            f"{path} cannot be read: {first_line(error)}.", hint="Copy the folder of the older library again."
        ) from error
    if not isinstance(data, dict):
        raise LoadError(f"{path} is not a JSON object.", hint="Copy the folder of the older library again.")
    return data
