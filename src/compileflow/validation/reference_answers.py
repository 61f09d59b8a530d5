"""Answers of the source model: computed once, then shared by all candidates, targets and later validations."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from compileflow._process.cpu import cpu_features
from compileflow._process.folders import file_written_whole
from compileflow._process.packages import installed_versions
from compileflow.contracts import Arrays
from compileflow.contracts.digests import canonical_json, json_digest
from compileflow.errors import first_line
from compileflow.source_model.interface import SourceModel
from compileflow.validation.measure import Model

# Raise it when the source model is loaded or called in another way.
_VERSION = "1"
# The answers of this many models stay, those that were used last, with this many bytes for each of them.
_MOST_MODELS, _MOST_BYTES = 8, 512 * 2**20
_LIBRARIES = ("compileflow", "torch", "transformers", "numpy")
_SUFFIX = ".safetensors"


class ReferenceAnswers:
    """Keeps the answers of one source model in a folder, a file for each call.

    A file holds its whole key and a checksum of the answer. Both are checked when it is read; a file that does not
    match is reported and replaced.

    Args:
        folder: Folder of the answers of all models. None: every answer is computed.
        key: Everything that changes the answers, besides the inputs.
        report: Called with a line about a file that cannot be used.
    """

    def __init__(self, folder: Path | None, key: Mapping[str, str], *, report: Callable[[str], object]) -> None:
        self._key = dict(key)
        self._report = report
        self._folder = None if folder is None else folder / json_digest(self._key)
        self._drawn: set[str] = set()
        self._room = _MOST_BYTES
        if self._folder is not None:
            self._tidy(self._folder)

    def leave_out(self, drawn: Collection[Arrays]) -> None:
        """Never keep the answers to these inputs, because no other artifact is called with them."""
        self._drawn |= {arrays_digest(inputs) for inputs in drawn}

    def remembered(self, run: Model, way: str = "as compared") -> Model:
        """Return the source model as a function that computes no answer twice.

        Args:
            run: Function that runs the source model.
            way: How it runs the model, such as "float64".
        """
        return lambda inputs: self.answer(inputs, lambda: run(inputs), way)

    def answer(self, inputs: Arrays, compute: Callable[[], Arrays], way: str) -> Arrays:
        """Return the answer to a call; `compute` is called if none is kept. The arrays must not be changed."""
        if self._folder is None:
            return compute()
        digest = arrays_digest(inputs)
        if digest in self._drawn:
            return compute()
        key = canonical_json(self._key | {"way": way, "inputs": digest}).decode()
        path = self._folder / f"{hashlib.sha256(key.encode()).hexdigest()}{_SUFFIX}"
        answer = self._read(path, key)
        if answer is None:
            answer = compute()
            self._write(path, key, answer)
        return answer

    def _read(self, path: Path, key: str) -> Arrays | None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                record = file.metadata() or {}
                answer = {name: file.get_tensor(name) for name in record.get("names", "").split("\n")}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, SafetensorError) as error:
            self._report(f"ignoring a damaged answer of the source model ({first_line(error)}): {path}")
            return None
        if record.get("key") == key and record.get("sha256") == arrays_digest(answer):
            return answer
        self._report(f"ignoring a damaged answer of the source model (its checksum differs): {path}")
        return None

    def _write(self, path: Path, key: str, answer: Arrays) -> None:
        from safetensors.numpy import save_file

        size = sum(value.nbytes for value in answer.values())
        if size > self._room:
            return
        record = {"key": key, "sha256": arrays_digest(answer), "names": "\n".join(answer)}
        try:
            with file_written_whole(path) as partial:
                save_file({name: np.ascontiguousarray(value) for name, value in answer.items()}, partial, record)
        # safetensors raises its own error where the disk is full.
        except Exception as error:  # noqa: BLE001 - a validation needs no kept answer
            self._report(f"the source model's answers are not kept: {first_line(error)}: {path.parent}")
            self._room = 0
            return
        self._room -= size

    def _tidy(self, folder: Path) -> None:
        """Mark the folder as used, and delete those of the models that were not used for longest."""
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            folder.touch()
            self._room -= sum(file.stat().st_size for file in folder.iterdir())
            by_age = sorted(folder.parent.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
            for old_folder in by_age[_MOST_MODELS:]:
                shutil.rmtree(old_folder, ignore_errors=True)


def reference_key(source_model: SourceModel, *, source_digest: str, hf_task: str, threads: int) -> dict[str, str]:
    """Return everything that changes the answers of a source model, besides the inputs."""
    return {
        "version": _VERSION,
        "source model": source_digest,
        "task": hf_task,
        "attention": source_model.attention,
        "outputs": ",".join(f"{record.name} {record.dtype}" for record in source_model.outputs),
        "threads": str(threads),
        "cpu": ",".join(cpu_features()),
    } | installed_versions(_LIBRARIES)


def arrays_digest(arrays: Mapping[str, Any]) -> str:
    """Return the SHA-256 of named arrays: names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, value in sorted(arrays.items()):
        digest.update(f"{name}\0{value.dtype.str}\0{value.shape}\0".encode())
        digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
