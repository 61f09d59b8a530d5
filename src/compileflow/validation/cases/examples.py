"""Natural examples: the user's own files, or those bundled with compileflow or generates."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import sys
import wave
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from compileflow.contracts.json_files import without_repeats
from compileflow.errors import MeasurementError, first_line
from compileflow.source_model.processor import Processor
from compileflow.spec import HfTask, Modality, Precision
from compileflow.validation.cases.generated_signals import NamedSignal, Signal, generated_signals
from compileflow.validation.cases.labels import (
    CLASS_FOLDERS,
    Example,
    check_ids,
    has_label,
    known_fields,
    label_fields,
    unused_fields,
)

# Images or recordings that are generated. Where each gives one decision, 268 without a mismatch show 99 %.
# fp32 allows no mismatch at all.
_GENERATED, _GENERATED_DECISIONS = 64, 272
_ONE_DECISION = (
    HfTask.IMAGE_CLASSIFICATION,
    HfTask.AUDIO_CLASSIFICATION,
    HfTask.ZERO_SHOT_IMAGE_CLASSIFICATION,
)
# That many decisions without a change show 99 %; see `rates`.
_ENOUGH = 300
_SUFFIXES: dict[Modality, tuple[str, ...]] = {
    "image": (".bmp", ".jpeg", ".jpg", ".png", ".webp"),
    "image-text": (".bmp", ".jpeg", ".jpg", ".png", ".webp"),
    "audio": (".wav",),
}

Value = TypeVar("Value")


def load_examples(task: HfTask, path: str | None, limit: int) -> tuple[list[Example], str, str]:
    """Read natural examples of text: the user's file, or the one bundled with compileflow.

    Returns:
        The first examples ({"text": ...}, or {"question": ..., "context": ...}, with the labels that
        `label_fields` returns), their origin in words, and the SHA-256 of the file.

    Raises:
        MeasurementError: The file cannot be read, or holds no example in the form that the task needs.
    """
    examples, lines, origin, digest = _read(task, path, lambda data: label_fields(data, task))
    try:
        check_ids(examples, lines)
    except ValueError as error:
        raise MeasurementError(
            f"The examples cannot be used: {error}: {path}.",
            hint="Give each document an id of its own, and under relevant the ids of the documents to find.",
        ) from error
    return examples[:limit], origin, digest


def sample_examples(task: HfTask, path: str | None, limit: int) -> tuple[list[Example], str, str]:
    """Read natural examples of text as `load_examples` does, but take a sample of a user's longer file.

    The sample is the same one each time. The first examples would often have one label, because files are sorted.
    Documents and their queries are the first ones of the file all the same: a sample would separate them.

    Returns:
        The examples and their origin, as of `load_examples`, and a SHA-256 that changes when they change.

    Raises:
        MeasurementError: See `load_examples`.
    """
    examples, origin, digest = load_examples(task, path, sys.maxsize)
    if path is None or len(examples) <= limit or _belong_together(examples, task):
        return examples[:limit], origin, digest
    digest = hashlib.sha256(f"{digest}, a sample of {limit}".encode()).hexdigest()
    return _sample(examples, limit), origin, digest


def _belong_together(examples: Sequence[Example], task: HfTask) -> bool:
    return task is HfTask.TEXT_RANKING or any("relevant" in example for example in examples)


def _sample(values: Sequence[Value], limit: int) -> list[Value]:
    """Return a random sample in the order of the values, the same one each time."""
    if len(values) <= limit:
        return list(values)
    positions = np.random.default_rng(0).choice(len(values), limit, replace=False)
    return [values[position] for position in sorted(positions)]


def note_on_count(task: HfTask, path: str, limit: int) -> str:
    """Return what to know about the number of the user's examples; "" if all are compared, and they are enough.

    Raises:
        MeasurementError: See `load_examples` and `load_signals`.
    """
    way = "a random sample"
    if task.modality == "text":
        examples, origin, _ = load_examples(task, path, sys.maxsize)
        total, noun = len(examples), "example"
        # Labels do not make two examples different.
        texts = [(example.get("question"), example.get("context"), example.get("text")) for example in examples]
        used = _sample(texts, limit)
        if _belong_together(examples, task):
            way, used = "the first ones", texts[:limit]
        different = len(set(used))
    else:
        by_class = task in CLASS_FOLDERS
        total = len(_signal_files(path, task.modality, by_class=by_class))
        origin, noun, different = Path(path).name, "file", min(total, limit)
        if by_class and class_names(path, task.modality):
            way = "some of each class"
    notes = []
    if total > limit:
        notes.append(f"Validation compares {limit} of the {total} {noun}s in {origin}, {way}.")
    if different < _ENOUGH:
        noun += "s" if different > 1 else ""
        notes.append(
            f"Validation has only {different} different {noun} in {origin}: {_ENOUGH} without a change show that "
            "at most 1 % of decisions change."
        )
    return " ".join(notes)


def example_lines(task: HfTask, path: str) -> list[int]:
    """Return the line of each example of the user's file. Raises as `load_examples` does."""
    return _read(task, path, lambda data: label_fields(data, task))[1]


def note_on_fields(task: HfTask, path: str) -> str:
    """Return a sentence about the fields of the user's examples that validation does not use; "" without any.

    Raises:
        MeasurementError: See `load_examples`.
    """
    fields_of_rows, _, origin, _ = _read(task, path, lambda data: unused_fields(data, task))
    names = list(dict.fromkeys(name for fields in fields_of_rows for name in fields))
    if not names:
        return ""
    used_fields, *_ = _read(task, path, lambda data: known_fields(data, task))
    texts, labels = used_fields[0]
    used, without = [*texts, *filter(None, [" or ".join(labels)])], ""
    if labels and not any(map(has_label, load_examples(task, path, len(used_fields))[0])):
        without = ", and no example has a label"
    return (
        f"Validation does not use {', '.join(map(repr, names))} of {origin}: for {task} it reads "
        f"{' and '.join(filter(None, [', '.join(used[:-1]), used[-1]]))}{without}."
    )


def _read(
    task: HfTask, path: str | None, read: Callable[[Mapping[str, Any]], Value]
) -> tuple[list[Value], list[int], str, str]:
    """Return what `read` makes of each example of a file, their lines and origin, and the SHA-256 of the file."""
    questions = task.reads_pairs
    try:
        if path is not None:
            origin, body = Path(path).name, Path(path).expanduser().read_bytes()
        else:
            origin = "questions_en.jsonl" if questions else "sentences_en.txt"
            body = (files("compileflow.validation") / "data" / origin).read_bytes()
            origin = f"compileflow's own {origin}"
        text = _decoded(body, path or origin).replace("\r\n", "\n")
        if origin.lower().endswith(".csv"):
            _refuse_other_separator(text.partition("\n")[0])
            examples = list(_rows(text, read))
        else:
            # Not splitlines: a JSON string may contain U+2028 and similar characters.
            is_json = origin.lower().endswith((".json", ".jsonl"))
            lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
            _refuse_table([line for _, line in lines[:1]])
            examples = [(number, _example(number, line, task, read, is_json=is_json)) for number, line in lines]
    except (OSError, ValueError, csv.Error) as error:
        hint = (
            'Give JSON lines or CSV with "question" and "context".'
            if questions
            else 'Give a text file with one example per line, or JSON lines or CSV with "text".'
        )
        if labels := known_fields({}, task)[1]:
            names = " or ".join(f'"{name}"' for name in labels)
            hint += f" A label goes into {names}."
        raise MeasurementError(f"The examples cannot be used: {first_line(error)}: {path}.", hint=hint) from error
    if not examples:
        raise MeasurementError(
            f"{path} holds no example.", hint="Give at least one; 300 are enough for most gates."
        )
    values, numbers = [value for _, value in examples], [number for number, _ in examples]
    return values, numbers, origin, hashlib.sha256(body).hexdigest()


def _decoded(body: bytes, path: str) -> str:
    try:
        return body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = error.object.count(b"\n", 0, error.start) + 1
        raise MeasurementError(
            f"The examples cannot be used: line {number} is not UTF-8: {path}.", hint="Save the file as UTF-8."
        ) from error


def _refuse_table(first_lines: Sequence[str]) -> None:
    """Refuse a table that is not named as CSV: each of its lines would be read as a text, labels included."""
    for line in first_lines:
        columns = re.split(r"[,;\t]", line.strip().casefold())
        if len(columns) > 1 and {"text", "question", "tokens"} & set(columns):
            raise ValueError(f"expected a table with commas in a file named .csv, got the header {line[:80]!r}")


def _refuse_other_separator(header: str) -> None:
    """Refuse CSV whose columns other characters than commas separate."""
    if "," not in header and len(re.split(r"[;\t]", header)) > 1:
        raise ValueError(f"expected columns that commas separate, got the header {header[:80]!r}")


def _example(
    number: int, line: str, task: HfTask, read: Callable[[Mapping[str, Any]], Value], *, is_json: bool
) -> Value:
    if line.startswith("{"):
        try:
            data = json.loads(line, object_pairs_hook=without_repeats)
            _refuse_surrogates(line, data)
            return read(data)
        except RecursionError as error:
            raise ValueError(f"line {number} is nested too deeply: {line[:80]}") from error
        except json.JSONDecodeError as error:
            reason = f"{error.msg} at column {error.colno}"
            raise ValueError(f"line {number} is not JSON: {reason}: {line[:80]}") from error
        except ValueError as error:
            raise ValueError(f"{error} in line {number}: {line[:80]}") from error
    if task.reads_pairs:
        raise ValueError(f"line {number} is not JSON with question and context: {line[:80]}")
    if is_json:
        raise ValueError(f"expected JSON lines, one object in each line, got line {number}: {line[:80]}")
    return read({"text": line})


def _refuse_surrogates(line: str, data: Any) -> None:
    """Refuse half of a surrogate pair, which JSON can write as an escape: no tokenizer takes it."""
    # Only an escape can stand for one, because the file is UTF-8.
    if "\\ud" not in line.casefold():
        return
    try:
        json.dumps(data, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{error.object[error.start]!a} is half of a surrogate pair") from error


def _rows(text: str, read: Callable[[Mapping[str, Any]], Value]) -> Iterator[tuple[int, Value]]:
    """Read CSV whose first row names the columns; yield the last line of each row with the row."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    names = reader.fieldnames or ()
    if len(set(names)) < len(names):
        raise ValueError(f"a column has the same name as another one: {', '.join(names)}")
    for row in reader:
        # DictReader puts missing cells under their column as None, and further cells under None.
        if None in row or None in row.values():
            raise ValueError(f"line {reader.line_num}: expected {len(reader.fieldnames or ())} cells")
        try:
            yield reader.line_num, read(row)
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

    More files than `limit` give a sample, the same one each time; of folders of classes, some files of each class.

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
    signals = []
    for file, label in _signal_files(path, processor.modality, limit, by_class=by_class):
        with _signal_errors(file, processor.modality):
            is_audio = processor.modality == "audio"
            values = _read_wav(file, processor.sampling_rate) if is_audio else _read_image(file)
        signals.append(NamedSignal(f"{label}/{file.name}" if label else file.name, values, label))
    return signals, Path(path).name, signals_digest(path, processor.modality, limit, by_class=by_class)


def check_signals(
    path: str, modality: Modality, limit: int, *, by_class: bool = False, sampling_rate: int | None = None
) -> None:
    """Refuse a folder of images or recordings if a file that validation would use cannot be read.

    Args:
        path: The folder.
        modality: Kind of the files.
        limit: Most examples that validation uses.
        by_class: Check the folders inside it as well.
        sampling_rate: Samples per second that the model takes. None: any.

    Raises:
        MeasurementError: The folder holds no such file, or a file cannot be read.
    """
    for file, _ in _signal_files(path, modality, limit, by_class=by_class):
        with _signal_errors(file, modality):
            if modality == "audio":
                _read_wav(file, sampling_rate)
            else:
                _check_image(file)


@contextmanager
def _signal_errors(file: Path, modality: Modality) -> Iterator[None]:
    """Turn an error of reading a file into one line that names the file."""
    try:
        yield
    except Exception as error:
        # Pillow raises errors of many classes.
        raise MeasurementError(
            f"The examples cannot be used: {file}: {first_line(error)}.",
            hint=f"Repair or remove that file. Examples are {', '.join(_SUFFIXES[modality])} files.",
        ) from error


def signals_digest(path: str | None, modality: Modality, limit: int, *, by_class: bool = False) -> str:
    """Return the SHA-256 of the names, labels and contents of the examples to compare; for None, of nothing.

    Args:
        path: The folder, or None.
        modality: Kind of the files.
        limit: Most examples that validation uses.
        by_class: Read the folders inside it as well.

    Raises:
        MeasurementError: The folder holds no example, or a file cannot be read.
    """
    digest = hashlib.sha256()
    for file, label in _signal_files(path, modality, limit, by_class=by_class) if path is not None else ():
        name = f"{label}/{file.name}" if label else file.name
        with _signal_errors(file, modality):
            digest.update(f"{name}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def class_names(path: str, modality: Modality) -> list[str]:
    """Return the names of the folders with examples inside a folder of examples."""
    return sorted({label for _, label in _signal_files(path, modality, by_class=True) if label is not None})


def _signal_files(
    path: str, modality: Modality, limit: int = sys.maxsize, *, by_class: bool
) -> list[tuple[Path, str | None]]:
    """Return the files with their labels; one of each class in turn, so that the limit leaves no class out."""
    suffixes, folder = _SUFFIXES[modality], Path(path).expanduser()

    def files_of(place: Path, label: str | None) -> list[tuple[Path, str | None]]:
        return [(entry, label) for entry in sorted(place.iterdir()) if entry.suffix.lower() in suffixes]

    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    folders = [entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    classes = [files_of(entry, entry.name) for entry in folders] if by_class else []
    in_turn = (entry for entries in zip_longest(*classes) for entry in entries if entry is not None)
    signal_files = [*(files_of(folder, None) if entries else ()), *in_turn]
    places = folders if by_class else [folder] if entries and not signal_files else []
    subfolders = (place / name for place in places for name in next(os.walk(place))[1])
    nested = (file for subfolder in subfolders for file in subfolder.rglob("*"))
    if deep := next((file for file in nested if file.suffix.lower() in suffixes), None):
        raise MeasurementError(
            f"{path} holds {modality} files in a folder too deep: {deep.relative_to(folder)}.",
            hint=f"Put the files directly into {'the folder of their label' if by_class else path}.",
        )
    if not signal_files:
        raise MeasurementError(
            f"{path} holds no {modality} file.", hint=f"Give a folder of {', '.join(suffixes)} files."
        )
    return signal_files[:limit] if any(classes) else _sample(signal_files, limit)


def _read_image(file: Path) -> Signal:
    from PIL import Image

    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def _check_image(file: Path) -> None:
    """Raise an error of Pillow if an image cannot be decoded, mostly without decoding it."""
    from PIL import Image

    with Image.open(file) as image:
        if image.format == "JPEG":
            # The format has no checksums. Decoding at an eighth of the size is fast and notices a file cut off.
            image.draft("RGB", (1, 1))
            image.load()
        else:
            image.verify()


def _read_wav(file: Path, rate: int | None) -> Signal:
    with wave.open(str(file)) as recording:
        rate = rate or recording.getframerate()
        if recording.getframerate() != rate or recording.getsampwidth() != 2:
            raise ValueError(
                f"expected {rate} samples per second of 16 bits, {file.name} has {recording.getframerate()} "
                f"of {8 * recording.getsampwidth()} bits"
            )
        frames = np.frombuffer(recording.readframes(recording.getnframes()), "<i2")
        if not frames.size:
            raise ValueError("it holds no samples")
        channels = frames.reshape(-1, recording.getnchannels())
    return np.asarray(channels.mean(axis=1) / 32768, np.float32)
