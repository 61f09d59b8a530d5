"""The source model's part of a validation, recorded in a folder for a machine that does the rest without it.

A machine without the target's device records every answer that a validation asks of the source model. A machine
with the device then compares the compiled model with the recorded answers.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from compileflow.contracts import Arrays, TensorRecord
from compileflow.contracts.digests import list_files
from compileflow.errors import MeasurementError
from compileflow.source_model.interface import SourceModel
from compileflow.source_model.load import load_config
from compileflow.source_model.token_rows import TokenRows
from compileflow.sources.files import kind_of
from compileflow.validation.reference_answers import ReferenceAnswers, arrays_digest

# Folder beside the report.
REFERENCE_FOLDER = "reference"
_INTERFACE, _SOURCE, _ANSWERS = "interface.json", "source", "answers"
_PLAIN_FIELDS = (
    "output_class", "pad_token_id", "vocab_size", "padding", "longest", "chunk", "attention", "numbers_tokens",
)  # fmt: skip


class RecordedAnswers(ReferenceAnswers):
    """Answers of the source model to the calls of one validation.

    Args:
        folder: Folder of the recorded reference.
        recording: Compute and keep every answer. False: return kept answers only.
    """

    def __init__(self, folder: Path, *, recording: bool) -> None:
        super().__init__(None, {}, report=lambda _: None)
        self._answers = folder / _ANSWERS
        self._recording = recording
        if recording:
            self._answers.mkdir(parents=True)

    def answer(self, inputs: Arrays, compute: Callable[[], Arrays], way: str) -> Arrays:
        """Return the kept answer to a call; while recording, compute it first.

        Raises:
            MeasurementError: No answer to this call was recorded.
        """
        from safetensors.numpy import load_file, save_file

        name = hashlib.sha256(f"{way}\0{arrays_digest(inputs)}".encode()).hexdigest()
        path = self._answers / f"{name}.safetensors"
        if path.is_file():
            return dict(load_file(path))
        if not self._recording:
            raise MeasurementError(
                "The recorded reference has no answer to one of the calls of this validation.",
                hint="Install the versions of compileflow and transformers that recorded it, or compile again.",
            )
        answer = compute()
        save_file({key: np.ascontiguousarray(value) for key, value in answer.items()}, path)
        return answer


class RecordedSource(SourceModel):
    """A source model without weights, whose answers were recorded."""

    def answered_by(self, answers: RecordedAnswers) -> RecordedSource:
        """Take the answers from this record."""
        object.__setattr__(self, "_recorded", answers)
        return self

    def run(self, inputs: Any) -> Arrays:
        """Return the recorded answer."""

        def absent() -> Arrays:
            raise AssertionError("unreachable: recorded answers are not computed")

        answers: RecordedAnswers = self.__dict__["_recorded"]
        return answers.answer(dict(inputs), absent, "as compared")


def record_interface(folder: Path, source_model: SourceModel, source_dir: Path, *, threads: int) -> None:
    """Record what a validation reads of a text model besides its answers: interface, sizes, and small files."""
    content = {
        **{name: getattr(source_model, name) for name in _PLAIN_FIELDS},
        "inputs": [record.model_dump(mode="json") for record in source_model.inputs],
        "outputs": [record.model_dump(mode="json") for record in source_model.outputs],
        "frame_convolutions": source_model.frame_convolutions,
        "tokens": None if source_model.tokens is None else _token_fields(source_model.tokens),
        "parameters": [list(parameter.shape) for parameter in source_model.model.parameters()],
        "threads": threads,
    }
    (folder / _INTERFACE).write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    for record in list_files(source_dir):
        # The weights of sentence-transformers' modules are needed to pool the outputs, and are small.
        if "/" in record.path or kind_of(record.path) != "weights":
            copy = folder / _SOURCE / record.path
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source_dir / record.path, copy)


def recorded_source_dir(folder: Path) -> Path:
    """Return the folder with the source model's small files."""
    return folder / _SOURCE


def recorded_threads(folder: Path) -> int:
    """Return the number of threads with which the source model answered."""
    return int(_read(folder)["threads"])


def load_recorded(folder: Path, answers: RecordedAnswers, *, trust_remote_code: bool) -> RecordedSource:
    """Return the source model of a recorded reference."""
    import torch

    content = _read(folder)
    tokens = content["tokens"]
    model = SimpleNamespace(
        config=load_config(folder / _SOURCE, trust_remote_code=trust_remote_code),
        parameters=lambda: [torch.empty(shape, device="meta") for shape in content["parameters"]],
    )
    return RecordedSource(
        model=model,
        inputs=tuple(TensorRecord.model_validate(record) for record in content["inputs"]),
        outputs=tuple(TensorRecord.model_validate(record) for record in content["outputs"]),
        frame_convolutions=tuple((kernel, stride) for kernel, stride in content["frame_convolutions"]),
        tokens=None if tokens is None else TokenRows(**{name: _frozen(name, tokens[name]) for name in tokens}),
        **{name: content[name] for name in _PLAIN_FIELDS},
    ).answered_by(answers)


def _read(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / _INTERFACE).read_text("utf-8"))
    return content


def _token_fields(tokens: TokenRows) -> dict[str, Any]:
    return asdict(tokens) | {"special_ids": sorted(tokens.special_ids)}


def _frozen(name: str, value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return frozenset(value) if name == "special_ids" else tuple(value)
