"""Generated images and recordings: some that resemble natural ones, and some that break preprocessing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compileflow.source_model.processor import Processor

Signal = NDArray[Any]

_PIXELS = (160, 256)
_SECONDS = (0.4, 3.0)


@dataclass(frozen=True)
class NamedSignal:
    """An image, uint8 (height, width, 3), or a recording, float32 (samples,), with its name in the report.

    Attributes:
        name: Name in the report.
        values: The image or the recording.
        label: Name of its label; None if it is unknown.
    """

    name: str
    values: Signal
    label: str | None = None


def generated_signals(processor: Processor, count: int, *, seed: int = 11) -> list[NamedSignal]:
    """Return images with edges over 1/f noise, or voiced sounds. The same seed gives the same signals."""
    random = np.random.default_rng(seed)
    if processor.modality == "image":
        return [NamedSignal(f"image {number + 1}", _image(random)) for number in range(count)]
    return [NamedSignal(f"sound {number + 1}", _sound(random, processor.sampling_rate)) for number in range(count)]


def odd_signals(processor: Processor) -> list[NamedSignal]:
    """Return signals that break normalization and resizing: flat, saturated, tiny, lopsided."""
    if processor.modality == "image":
        shapes = {"one pixel": (1, 1), "a thin strip": (8, 400), "a tall strip": (400, 8)}
        sizes = [NamedSignal(name, np.full((*size, 3), 128, np.uint8)) for name, size in shapes.items()]
        return sizes + [
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
    """Return a gliding tone with the falling harmonics of a voice, in syllables, over faint noise."""
    seconds = random.uniform(*_SECONDS)
    time = np.arange(int(seconds * rate)) / rate
    pitch = random.uniform(90, 240) * (1 + 0.15 * np.sin(2 * np.pi * random.uniform(0.5, 2) * time))
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    voice = sum(np.sin(harmonic * phase) / harmonic ** random.uniform(0.8, 1.6) for harmonic in range(1, 20))
    syllables = np.clip(np.sin(2 * np.pi * random.uniform(2, 5) * time) + 0.3, 0, 1)
    samples = 0.1 * np.asarray(voice) * syllables + 0.01 * random.standard_normal(time.size)
    return samples.astype(np.float32)
