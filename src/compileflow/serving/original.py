"""The uncompiled pipeline beside an artifact's files: load it, and complete an artifact before it is saved."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from compileflow._process.folders import work_folder
from compileflow.artifact.manifest import ATTESTATIONS_NAME, MANIFEST_NAME, ORIGINAL_FOLDER, artifact_files
from compileflow.artifact.open import OpenArtifact, copy_artifact, open_artifact
from compileflow.contracts.digests import folder_digest, list_files
from compileflow.errors import IntegrityError
from compileflow.serving.interface_files import check_files, foreign_errors
from compileflow.serving.older_folder import TASK_FILE, OlderArtifact
from compileflow.serving.tokenizer import CompiledTokenizer, write_tokenizer
from compileflow.settings import get_settings
from compileflow.sources.files import kind_of


def load_original(artifact: OpenArtifact) -> Any:
    """Load the uncompiled pipeline that was saved with an artifact; return None if there is none.

    Raises:
        IntegrityError: The files differ from those that the artifact was compiled from.
        LoadError: transformers cannot load it.
    """
    folder = artifact.original_folder
    if not folder.is_dir():
        return None
    expected, digest = artifact.manifest.source.digest, folder_digest(list_files(folder))
    # A folder of the older library has no digests.
    if digest != expected and not isinstance(artifact, OlderArtifact):
        raise IntegrityError(
            f"{folder} was altered: expected the digest {expected[:12]}..., found {digest[:12]}...",
            hint="Save the pipeline again, or delete that folder: the artifact does not need it.",
        )
    artifact.check_code()
    check_files(artifact, folder)
    from transformers import pipeline

    with foreign_errors(folder, f"transformers cannot load {folder}"):
        return pipeline(
            original_task(artifact),
            model=str(folder),
            device="cpu",
            trust_remote_code=artifact.trust_remote_code,
        )


def original_task(artifact: OpenArtifact) -> str:
    """Return the task of the original pipeline as its caller named it, or else the task of the artifact."""
    folder = artifact.saved_folder if isinstance(artifact, OlderArtifact) else artifact.original_folder
    path = folder / TASK_FILE
    return str(json.loads(path.read_text("utf-8"))["task"]) if path.is_file() else artifact.manifest.hf_task.value


def write_task(folder: Path, task: str) -> None:
    """Write the name of the original pipeline's task, which may be an alias, into an existing folder."""
    (folder / TASK_FILE).write_text(json.dumps({"task": task}) + "\n", "utf-8")


@contextmanager
def completed_artifact(artifact: OpenArtifact, tokenizer: Any, original: Any) -> Iterator[OpenArtifact]:
    """Give an artifact that has a tokenizer and, where there is one, the original pipeline.

    A pipeline that was put together from parts has an artifact of the model alone. The files that it lacks make it
    another artifact, without attestations. An artifact that is complete is given unchanged.
    """
    lacks_tokenizer = tokenizer is not None and not any(
        kind_of(record.path) == "tokenizer" for record in artifact.manifest.files
    )
    lacks_original = original is not None and not artifact.original_folder.is_dir()
    if not lacks_tokenizer and not lacks_original:
        yield artifact
        return
    with work_folder(get_settings().work_dir, label="save") as work:
        folder = copy_artifact(artifact, work / "artifact")
        (folder / ATTESTATIONS_NAME).unlink(missing_ok=True)
        manifest = artifact.manifest
        if lacks_tokenizer:
            if isinstance(tokenizer, CompiledTokenizer):
                tokenizer.write(folder)
            else:
                write_tokenizer(tokenizer, folder)
        if lacks_original:
            original.save_pretrained(folder / ORIGINAL_FOLDER)
            write_task(folder / ORIGINAL_FOLDER, original.task)
            digest = folder_digest(list_files(folder / ORIGINAL_FOLDER))
            source = manifest.source.model_copy(update={"digest": digest, "revision": digest})
            manifest = manifest.model_copy(update={"source": source})
        records = [record for record in artifact_files(folder) if record.path != MANIFEST_NAME]
        manifest.model_copy(update={"files": tuple(records)}).write(folder)
        opened = open_artifact(folder, require_signature=False)
        yield replace(opened, trust_remote_code=artifact.trust_remote_code)
