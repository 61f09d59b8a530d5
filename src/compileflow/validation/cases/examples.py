"""Natural examples: the user's own files, or those bundled with compileflow or generates."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import wave
from collections.abc import Iterator
from importlib.resources import files
from itertools import zip_longest
from pathlib import Path

import numpy as np

from compileflow.errors import MeasurementError, first_line
from compileflow.source_model.processor import Processor
from compileflow.spec import HfTask, Modality, Precision
from compileflow.validation.cases.generated_signals import NamedSignal, Signal, generated_signals
from compileflow.validation.cases.labels import Example, label_fields

# Images or recordings that are generated. Where each gives one decision, 268 without a mismatch show 99 %.
# fp32 allows no mismatch at all.
_GENERATED, _GENERATED_DECISIONS = 64, 272
_ONE_DECISION = (
    HfTask.IMAGE_CLASSIFICATION,
    HfTask.AUDIO_CLASSIFICATION,
    HfTask.ZERO_SHOT_IMAGE_CLASSIFICATION,
)
_SUFFIXES: dict[Modality, tuple[str, ...]] = {
    "image": (".bmp", ".jpeg", ".jpg", ".png", ".webp"),
    "image-text": (".bmp", ".jpeg", ".jpg", ".png", ".webp"),
    "audio": (".wav",),
}


def load_examples(task: HfTask, path: str | None, limit: int) -> tuple[list[Example], str, str]:
    """Read natural examples of text: the user's file, or the one bundled with compileflow.

    Returns:
        The examples ({"text": ...}, or {"question": ..., "context": ...}, with the labels that `label_fields`
        returns), their origin in words, and the SHA-256 of the file.

    Raises:
        MeasurementError: The file cannot be read, or holds no example in the form that the task needs.
    """
    questions = task.reads_pairs
    try:
        if path is not None:
            origin, body = Path(path).name, Path(path).expanduser().read_bytes()
        else:
            origin = "questions_en.jsonl" if questions else "sentences_en.txt"
            body = (files("compileflow.validation") / "data" / origin).read_bytes()
            origin = f"compileflow's own {origin}"
        text = body.decode("utf-8-sig").replace("\r\n", "\n")
        if origin.lower().endswith(".csv"):
            examples = list(_rows(text, task))
        else:
            # Not splitlines: a JSON string may contain U+2028 and similar characters.
            is_json = origin.lower().endswith((".json", ".jsonl"))
            examples = [_example(line, task, is_json=is_json) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError, csv.Error) as error:
        raise MeasurementError(
            f"The examples cannot be used: {first_line(error)}: {path}.",
            hint='Give JSON lines or CSV with "question" and "context".'
            if questions
            else 'Give a text file with one example per line, or JSON lines or CSV with "text".',
        ) from error
    if not examples:
        raise MeasurementError(
            f"{path} holds no example.", hint="Give at least one; 300 are enough for most gates."
        )
    return examples[:limit], origin, hashlib.sha256(body).hexdigest()


def _example(line: str, task: HfTask, *, is_json: bool) -> Example:
    if line.startswith("{"):
        data = json.loads(line)
        try:
            return label_fields(data, task)
        except ValueError as error:
            raise ValueError(f"{error} in a line: {line[:80]}") from error
    if task.reads_pairs:
        raise ValueError(f"a line is not JSON with question and context: {line[:80]}")
    if is_json:
        raise ValueError(f"expected JSON lines, one object in each line, got a line: {line[:80]}")
    return {"text": line}


def _rows(text: str, task: HfTask) -> Iterator[Example]:
    """Read CSV whose first row names the columns."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    names = reader.fieldnames or ()
    if len(set(names)) < len(names):
        raise ValueError(f"a column has the same name as another one: {', '.join(names)}")
    for row in reader:
        # DictReader puts missing cells under their column as None, and further cells under None.
        if None in row or None in row.values():
            raise ValueError(f"line {reader.line_num}: expected {len(reader.fieldnames or ())} cells")
        try:
            yield label_fields(row, task)
        except ValueError as error:
            raise ValueError(f"line {reader.line_num}: {error}") from error


def generated_count(task: HfTask, precision: Precision) -> int:
    """Return how many images or recordings are generated, so that a compiled model without a mismatch passes."""
    needs_a_rate = task in _ONE_DECISION and precision is not Precision.FP32
    return _GENERATED_DECISIONS if needs_a_rate else _GENERATED


def load_signals(
    processor: Processor,
    path: str | None,
    limit: int,
    *,
    generated: int = _GENERATED,
    by_class: bool = False,
) -> tuple[list[NamedSignal], str, str]:
    """Read a folder of image or WAV files, sorted by name, or generate examples.

    Args:
        processor: Processor of the model.
        path: The folder. None: generate examples.
        limit: Most examples.
        generated: Number of examples to generate.
        by_class: Read the folders inside it as well: their names are the labels of their files.

    Returns:
        The signals, their origin in words, and a SHA-256 that changes when they change.

    Raises:
        MeasurementError: The folder holds no such file, or a file cannot be read.
    """
    if path is None:
        count = min(limit, generated)
        origin = f"{count} {processor.modality} examples that compileflow generates"
        return generated_signals(processor, count), origin, hashlib.sha256(origin.encode()).hexdigest()
    signal_files = _signal_files(path, processor.modality, by_class=by_class)[:limit]
    read_signal = _read_image if processor.modality == "image" else _read_wav
    try:
        signals = [
            NamedSignal(
                f"{label}/{file.name}" if label else file.name, read_signal(file, processor.sampling_rate), label
            )
            for file, label in signal_files
        ]
    except (OSError, EOFError, ValueError, wave.Error) as error:
        raise MeasurementError(
            f"The examples cannot be used: {first_line(error)}: {path}.",
            hint=f"Give a folder of {', '.join(_SUFFIXES[processor.modality])} files.",
        ) from error
    return signals, Path(path).name, signals_digest(path, processor.modality, by_class=by_class)


def signals_digest(path: str | None, modality: Modality, *, by_class: bool = False) -> str:
    """Return the SHA-256 of the names, labels and contents of a folder's examples; for None, of nothing.

    Raises:
        MeasurementError: The folder holds no example.
    """
    digest = hashlib.sha256()
    for file, label in _signal_files(path, modality, by_class=by_class) if path is not None else ():
        name = f"{label}/{file.name}" if label else file.name
        digest.update(f"{name}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def class_names(path: str, modality: Modality) -> list[str]:
    """Return the names of the folders with examples inside a folder of examples."""
    return sorted({label for _, label in _signal_files(path, modality, by_class=True) if label is not None})


def _signal_files(path: str, modality: Modality, *, by_class: bool) -> list[tuple[Path, str | None]]:
    """Return the files with their labels; one of each class in turn, so that a limit leaves no class out."""
    suffixes, folder = _SUFFIXES[modality], Path(path).expanduser()

    def files_of(place: Path, label: str | None) -> list[tuple[Path, str | None]]:
        return [(entry, label) for entry in sorted(place.iterdir()) if entry.suffix.lower() in suffixes]

    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    folders = [entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    classes = [files_of(entry, entry.name) for entry in folders] if by_class else []
    in_turn = (entry for entries in zip_longest(*classes) for entry in entries if entry is not None)
    signal_files = [*(files_of(folder, None) if entries else ()), *in_turn]
    if not signal_files:
        raise MeasurementError(
            f"{path} holds no {modality} file.", hint=f"Give a folder of {', '.join(suffixes)} files."
        )
    return signal_files


def _read_image(file: Path, _: int) -> Signal:
    from PIL import Image

    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def _read_wav(file: Path, rate: int) -> Signal:
    with wave.open(str(file)) as recording:
        if recording.getframerate() != rate or recording.getsampwidth() != 2:
            raise ValueError(
                f"expected {rate} samples per second of 16 bits, {file.name} has {recording.getframerate()} "
                f"of {8 * recording.getsampwidth()} bits"
            )
        frames = np.frombuffer(recording.readframes(recording.getnframes()), "<i2")
        channels = frames.reshape(-1, recording.getnchannels())
    return np.asarray(channels.mean(axis=1) / 32768, np.float32)
