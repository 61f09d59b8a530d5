"""Rows, lengths and frames of a call: how they follow from the shape of its main input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from compileflow.contracts import TensorRecord
from compileflow.errors import SpecError

Convolutions = tuple[tuple[int, int], ...]


def call_sizes(main_input: TensorRecord, value: NDArray[Any]) -> tuple[int, int]:
    """Return rows and length of a call, the batch and sequence axes of its main input; length 1 without one."""
    axes = main_input.axes
    return value.shape[0], value.shape[axes.index("sequence")] if "sequence" in axes else 1


def frame_convolutions(config: Any, observed: Sequence[tuple[int, int]]) -> Convolutions:
    """Return (kernel, stride) of each convolution between a graph's input and its frames.

    Args:
        config: The source model's.
        observed: Lengths of inputs, and the number of frames that the model made of each; empty where no
            output has frames.

    Raises:
        SpecError: the configuration's convolutions do not give these numbers.
    """
    kernels, strides = getattr(config, "conv_kernel", None) or (), getattr(config, "conv_stride", None) or ()
    rule = tuple((int(k), int(s)) for k, s in zip(kernels, strides, strict=True))
    for length, frames in observed:
        if frames_of(rule, length) != frames:
            raise SpecError(
                f"{config.model_type} makes {frames} frames of {length}, and its configuration's convolutions "
                f"{frames_of(rule, length)}: answers could not be cut to their length.",
                hint="This architecture cannot be compiled yet; report it.",
            )
    return rule


def frames_of(convolutions: Convolutions, length: int) -> int:
    """Return how many frames a chain of unpadded convolutions makes: floor((n - kernel) / stride) + 1 each."""
    for kernel, stride in convolutions:
        length = max(0, (length - kernel) // stride + 1)
    return length


def shortest_input(convolutions: Convolutions, frames: int = 1) -> int:
    """Return the shortest input that still gives so many frames; `frames` itself without convolutions."""
    length = frames
    for kernel, stride in reversed(convolutions):
        length = (length - 1) * stride + kernel
    return length
