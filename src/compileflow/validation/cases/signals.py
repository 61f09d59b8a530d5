"""The inputs of a validation of images or audio: generated signals, and the user's own files."""

from __future__ import annotations

import hashlib
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compileflow.contracts import Arrays, ComponentRecord
from compileflow.errors import MeasurementError
from compileflow.source_model.lengths import call_sizes, frames_of, shortest_input
from compileflow.source_model.processor import Processor
from compileflow.spec import Modality
from compileflow.validation.cases.text import Case

Signal = NDArray[Any]

_GENERATED = 64
_BATCH = 8
_SUFFIXES: dict[Modality, tuple[str, ...]] = {
    "image": (".bmp", ".jpeg", ".jpg", ".png", ".webp"),
    "audio": (".wav",),
}
_PIXELS = (160, 256)
_SECONDS = (0.4, 3.0)


@dataclass(frozen=True)
class NamedSignal:
    """An image, uint8 (height, width, 3), or audio, float32 (samples,), and what the report calls it."""

    name: str
    values: Signal


@dataclass(frozen=True)
class SignalCases:
    """Builds cases for one compiled component.

    Attributes:
        processor: The source model's own.
        record: The component's interface.
    """

    processor: Processor
    record: ComponentRecord

    def case(self, name: str, family: str, signals: Sequence[NamedSignal]) -> Case:
        """Make one batch of signals; what counts is what the processor's mask says, or everything."""
        made = self.processor([signal.values for signal in signals])
        inputs = {each.name: self._cut(each.axes, made[each.name]) for each in self.record.inputs}
        return Case(name, family, tuple(signal.name for signal in signals), inputs, self.counted(inputs))

    def counted(self, inputs: Arrays) -> NDArray[Any]:
        """Return 1 where a frame counts, shape (batch, frames); (batch, 1) of ones where no output has frames."""
        rows, length = call_sizes(self.record.inputs[0], inputs[self.record.inputs[0].name])
        if not any("frames" in each.axes for each in self.record.outputs):
            return np.ones((rows, 1), int)
        kept = inputs["attention_mask"].sum(axis=1) if "attention_mask" in inputs else np.full(rows, length)
        rule = self.record.frame_convolutions
        return np.stack([np.arange(frames_of(rule, length)) < frames_of(rule, int(n)) for n in kept]).astype(int)

    def generated(self) -> list[Case]:
        """Build the cases that no natural example brings: flat and loud signals, shortest and longest, batches."""
        one = generated_signals(self.processor, _BATCH)
        cases = [self.case(signal.name, "signal", [signal]) for signal in odd_signals(self.processor)]
        cases += [self.case(f"{rows} at once", "batch", one[:rows]) for rows in (2, 3, _BATCH)]
        cases.append(self.case("the batch's first row alone", "batch", one[:1]))
        if "sequence" in self.record.inputs[0].axes:
            cases += [self.case(f"length {n}", "length", [self.noise(n)]) for n in self._lengths()]
        return cases

    def noise(self, length: int) -> NamedSignal:
        """Return noise whose row has about `length` elements."""
        rate = self.processor.sampling_rate
        per_second = call_sizes(self.record.inputs[0], self._row(np.zeros(rate, np.float32)))[1]
        samples = max(1, round(length * rate / per_second)) if per_second != rate else length
        return NamedSignal(f"noise, {length}", np.random.default_rng(7).standard_normal(samples, dtype=np.float32))

    def timed(self, rows: int, length: int) -> Arrays:
        """Return inputs of a shape that both models are timed at."""
        if "sequence" in self.record.inputs[0].axes:
            signal = self.noise(length)
        else:
            signal = generated_signals(self.processor, 1)[0]
        return self.case("timed", "timed", [signal] * rows).inputs

    def _row(self, signal: Signal) -> NDArray[Any]:
        return self.processor([signal])[self.record.inputs[0].name]

    def _lengths(self) -> list[int]:
        shortest, longest = shortest_input(self.record.frame_convolutions), self.record.max_sequence_length
        edges = {bucket.sequence_length for bucket in self.record.shape_buckets}
        lengths = {shortest, shortest + 1, longest} | {n for edge in edges for n in (edge - 1, edge, edge + 1)}
        return sorted(n for n in lengths if shortest <= n <= longest)

    def _cut(self, axes: Sequence[Any], values: NDArray[Any]) -> NDArray[Any]:
        if "sequence" not in axes:
            return values
        index = [slice(self.record.max_sequence_length if axis == "sequence" else None) for axis in axes]
        return np.ascontiguousarray(values[tuple(index)])


def generated_signals(processor: Processor, count: int) -> list[NamedSignal]:
    """Make signals with the spectrum of natural ones: 1/f images with edges, voiced sounds. Always the same."""
    random = np.random.default_rng(11)
    if processor.modality == "image":
        return [NamedSignal(f"image {n + 1}", _image(random)) for n in range(count)]
    return [NamedSignal(f"sound {n + 1}", _sound(random, processor.sampling_rate)) for n in range(count)]


def odd_signals(processor: Processor) -> list[NamedSignal]:
    """Return what breaks normalisation and resizing: flat, saturated, tiny, lopsided."""
    if processor.modality == "image":
        shapes = {"one pixel": (1, 1), "a thin strip": (8, 400), "a tall strip": (400, 8)}
        odd = [NamedSignal(name, np.full((*size, 3), 128, np.uint8)) for name, size in shapes.items()]
        return odd + [
            NamedSignal(f"all {name}", np.full((200, 200, 3), value, np.uint8))
            for name, value in {"black": 0, "white": 255}.items()
        ]
    second = processor.sampling_rate
    clipped = np.sign(np.sin(np.arange(second) * 0.05)).astype(np.float32)
    return [
        NamedSignal("silence", np.zeros(second, np.float32)),
        NamedSignal("constant", np.full(second, 0.5, np.float32)),
        NamedSignal("clipped", clipped),
        NamedSignal("far too loud", clipped * 1000),
    ]


def load_signals(processor: Processor, path: str | None, limit: int) -> tuple[list[NamedSignal], str, str]:
    """Read a folder of image or WAV files, sorted by name, or generate examples.

    Returns:
        The signals, where they come from, and a SHA-256 of what decides them.

    Raises:
        MeasurementError: the folder has none, or a file cannot be read.
    """
    if path is None:
        count = min(limit, _GENERATED)
        origin = f"{count} {processor.modality} examples that compileflow generates"
        return generated_signals(processor, count), origin, hashlib.sha256(origin.encode()).hexdigest()
    files = signal_files(path, processor.modality)[:limit]
    read = _read_image if processor.modality == "image" else _read_wav
    try:
        signals = [NamedSignal(file.name, read(file, processor.sampling_rate)) for file in files]
    except (OSError, EOFError, ValueError, wave.Error) as error:
        raise MeasurementError(
            f"The examples in {path} cannot be used: {error}.",
            hint=f"Give a folder of {', '.join(_SUFFIXES[processor.modality])} files.",
        ) from error
    return signals, Path(path).name, signals_digest(path, processor.modality)


def signal_files(path: str, modality: Modality) -> list[Path]:
    """List the files of a folder that are examples, sorted by name.

    Raises:
        MeasurementError: there is none.
    """
    folder = Path(path).expanduser()
    found = [each for each in sorted(folder.iterdir()) if each.suffix.lower() in _SUFFIXES[modality]] if (
        folder.is_dir()
    ) else []  # fmt: skip
    if not found:
        raise MeasurementError(
            f"{path} holds no {modality} file.", hint=f"Give a folder of {', '.join(_SUFFIXES[modality])} files."
        )
    return found


def signals_digest(path: str | None, modality: Modality) -> str:
    """Return the SHA-256 of names and contents of a folder's examples; of nothing for generated ones."""
    digest = hashlib.sha256()
    for file in signal_files(path, modality) if path is not None else ():
        digest.update(f"{file.name}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _image(random: np.random.Generator) -> Signal:
    """Return noise whose amplitude falls with frequency, as in photographs, and a few rectangles for edges."""
    height, width = random.integers(*_PIXELS, 2)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    frequency[0, 0] = 1 / max(height, width)
    channels = []
    for _ in range(3):
        spectrum = np.fft.fft2(random.standard_normal((height, width))) / frequency
        plane = np.fft.ifft2(spectrum).real
        channels.append((plane - plane.min()) / np.ptp(plane) * 255)
    image = np.stack(channels, axis=-1)
    for _ in range(3):
        top, left = random.integers(0, height // 2), random.integers(0, width // 2)
        image[top : top + height // 3, left : left + width // 4] = random.integers(0, 256, 3)
    return image.astype(np.uint8)


def _sound(random: np.random.Generator, rate: int) -> Signal:
    """Return a gliding tone with harmonics that fall off as a voice's do, in syllables, with breath between."""
    seconds = random.uniform(*_SECONDS)
    time = np.arange(int(seconds * rate)) / rate
    pitch = random.uniform(90, 240) * (1 + 0.15 * np.sin(2 * np.pi * random.uniform(0.5, 2) * time))
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    voice = sum(np.sin(n * phase) / n ** random.uniform(0.8, 1.6) for n in range(1, 20))
    syllables = np.clip(np.sin(2 * np.pi * random.uniform(2, 5) * time) + 0.3, 0, 1)
    sound = 0.1 * np.asarray(voice) * syllables + 0.01 * random.standard_normal(time.size)
    return sound.astype(np.float32)


def _read_image(file: Path, _: int) -> Signal:
    from PIL import Image

    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def _read_wav(file: Path, rate: int) -> Signal:
    with wave.open(str(file)) as sound:
        if sound.getframerate() != rate or sound.getsampwidth() != 2:
            raise ValueError(
                f"{file.name} has {sound.getframerate()} samples a second of {8 * sound.getsampwidth()} bits; "
                f"needed are {rate} of 16"
            )
        frames = np.frombuffer(sound.readframes(sound.getnframes()), "<i2").reshape(-1, sound.getnchannels())
    return np.asarray(frames.mean(axis=1) / 32768, np.float32)
