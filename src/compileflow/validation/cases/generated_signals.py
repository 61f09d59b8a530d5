"""Generated images and recordings: natural ones, and some that break preprocessing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compileflow.source_model.processor import Processor
from compileflow.validation.cases.pictures import pictures
from compileflow.validation.cases.speech import recordings

Signal = NDArray[Any]


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
    """Return images or recordings with the statistics of photographs or speech, the same for the same seed."""
    random = np.random.default_rng(seed)
    if processor.modality == "image":
        return [NamedSignal(f"image {number}", values) for number, values in enumerate(pictures(count, random), 1)]
    sounds = recordings(count, processor.sampling_rate, random)
    return [NamedSignal(f"sound {number}", values) for number, values in enumerate(sounds, 1)]


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
