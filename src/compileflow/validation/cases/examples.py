"""Natural examples: the user's own files, or those bundled with compileflow or generates."""

from __future__ import annotations

import hashlib
import json
import wave
from importlib.resources import files
from pathlib import Path

import numpy as np

from compileflow.errors import MeasurementError, first_line
from compileflow.source_model.processor import Processor
from compileflow.spec import HfTask, Modality, Precision
from compileflow.validation.cases.generated_signals import NamedSignal, Signal, generated_signals

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


def load_examples(task: HfTask, path: str | None, limit: int) -> tuple[list[dict[str, str]], str, str]:
    """Read natural examples of text: the user's file, or the one bundled with compileflow.

    Returns:
        The examples ({"text": ...}, or {"question": ..., "context": ...}, and a "label" where a classifier's file
        has one), their origin in words, and the SHA-256 of the file.

    Raises:
        MeasurementError: The file cannot be read, or holds no example in the form that the task needs.
    """
    questions, labelled = task.reads_pairs, task.graph_task is HfTask.TEXT_CLASSIFICATION
    try:
        if path is not None:
            origin, body = Path(path).name, Path(path).expanduser().read_bytes()
        else:
            origin = "questions_en.jsonl" if questions else "sentences_en.txt"
            body = (files("compileflow.validation") / "data" / origin).read_bytes()
            origin = f"compileflow's own {origin}"
        # Not splitlines: a JSON string may contain U+2028 and similar characters.
        lines = body.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
        examples = [_example(line, questions, labelled) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise MeasurementError(
            f"The examples cannot be used: {first_line(error)}: {path}.",
            hint='Give JSON lines with "question" and "context".'
            if questions
            else 'Give a text file with one example per line, or JSON lines with "text"'
            + (' and perhaps "label".' if labelled else "."),
        ) from error
    if not examples:
        raise MeasurementError(
            f"{path} holds no example.", hint="Give at least one; 300 are enough for most gates."
        )
    return examples[:limit], origin, hashlib.sha256(body).hexdigest()


def _example(line: str, questions: bool, labelled: bool) -> dict[str, str]:
    fields = ("question", "context") if questions else ("text",)
    if line.startswith("{"):
        data = json.loads(line)
        for name in fields:
            if not isinstance(data.get(name), str):
                problem = "is not a string" if name in data else "is missing"
                raise ValueError(f"{name} {problem} in a line: {line[:80]}")
        has_label = labelled and isinstance(data.get("label"), str | int)
        return {name: data[name] for name in fields} | ({"label": str(data["label"])} if has_label else {})
    if questions:
        raise ValueError(f"a line is not JSON with question and context: {line[:80]}")
    return {"text": line}


def generated_count(task: HfTask, precision: Precision) -> int:
    """Return how many images or recordings are generated, so that a compiled model without a mismatch passes."""
    needs_a_rate = task in _ONE_DECISION and precision is not Precision.FP32
    return _GENERATED_DECISIONS if needs_a_rate else _GENERATED


def load_signals(
    processor: Processor, path: str | None, limit: int, *, generated: int = _GENERATED
) -> tuple[list[NamedSignal], str, str]:
    """Read a folder of image or WAV files, sorted by name, or generate examples.

    Args:
        processor: Processor of the model.
        path: The folder. None: generate examples.
        limit: Most examples.
        generated: Number of examples to generate.

    Returns:
        The signals, their origin in words, and a SHA-256 that changes when they change.

    Raises:
        MeasurementError: The folder holds no such file, or a file cannot be read.
    """
    if path is None:
        count = min(limit, generated)
        origin = f"{count} {processor.modality} examples that compileflow generates"
        return generated_signals(processor, count), origin, hashlib.sha256(origin.encode()).hexdigest()
    signal_files = _signal_files(path, processor.modality)[:limit]
    read_signal = _read_image if processor.modality == "image" else _read_wav
    try:
        signals = [NamedSignal(file.name, read_signal(file, processor.sampling_rate)) for file in signal_files]
    except (OSError, EOFError, ValueError, wave.Error) as error:
        raise MeasurementError(
            f"The examples cannot be used: {first_line(error)}: {path}.",
            hint=f"Give a folder of {', '.join(_SUFFIXES[processor.modality])} files.",
        ) from error
    return signals, Path(path).name, signals_digest(path, processor.modality)


def signals_digest(path: str | None, modality: Modality) -> str:
    """Return the SHA-256 of the names and contents of a folder's examples; for None, of nothing.

    Raises:
        MeasurementError: The folder holds no example.
    """
    digest = hashlib.sha256()
    for file in _signal_files(path, modality) if path is not None else ():
        digest.update(f"{file.name}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _signal_files(path: str, modality: Modality) -> list[Path]:
    suffixes, folder = _SUFFIXES[modality], Path(path).expanduser()
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    signal_files = [entry for entry in entries if entry.suffix.lower() in suffixes]
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
