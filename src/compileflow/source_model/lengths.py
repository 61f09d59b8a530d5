"""Rows, lengths and frames of a call, computed from the shape of its main input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from compileflow.contracts import TensorRecord
from compileflow.errors import SpecError

Convolutions = tuple[tuple[int, int], ...]


def call_sizes(main_input: TensorRecord, value: NDArray[Any]) -> tuple[int, int]:
    """Return the rows and the length of a call: the batch and sequence axes of its main input.

    The length is 1 where the input has no sequence axis.
    """
    axes = main_input.axes
    return value.shape[0], value.shape[axes.index("sequence")] if "sequence" in axes else 1


def convolutions_of(config: Any) -> Convolutions:
    """Return (kernel, stride) of each convolution that the configuration of a speech model lists."""
    kernels, strides = getattr(config, "conv_kernel", None), getattr(config, "conv_stride", None)
    if not isinstance(kernels, (list, tuple)) or not isinstance(strides, (list, tuple)):
        # Mamba has one kernel, which keeps the length.
        return ()
    return tuple((int(kernel), int(stride)) for kernel, stride in zip(kernels, strides, strict=True))


def x_vector_convolutions(config: Any) -> Convolutions:
    """Return (kernel, stride) of each convolution of an x-vector model, and (2, 1) for its standard deviation.

    The model has no output with frames, but these give the shortest input.
    """
    kernels = zip(config.tdnn_kernel, config.tdnn_dilation, strict=True)
    head = [((kernel - 1) * dilation + 1, 1) for kernel, dilation in kernels]
    return (*convolutions_of(config), *head, (2, 1))


def frame_convolutions(config: Any, observed: Sequence[tuple[int, int]]) -> Convolutions:
    """Return (kernel, stride) of each convolution between a model's input and its frames.

    Args:
        config: Configuration of the source model.
        observed: (length of an input, number of frames of the answer) pairs; empty where no output has frames.

    Raises:
        SpecError: The convolutions of the configuration do not give these numbers of frames.
    """
    convolutions = convolutions_of(config)
    for length, frames in observed:
        if frames_of(convolutions, length) != frames:
            raise SpecError(
                f"Expected {frames_of(convolutions, length)} frames for an input of length {length} from the "
                f"convolutions in config.json, got {frames} from {config.model_type}.",
                hint="compileflow cannot cut the padded answers of this architecture yet. Please report it.",
            )
    return convolutions


def frames_of(convolutions: Convolutions, length: int) -> int:
    """Return the frames after a chain of unpadded convolutions: floor((n - kernel) / stride) + 1 each."""
    for kernel, stride in convolutions:
        length = max(0, (length - kernel) // stride + 1)
    return length


def shortest_input(convolutions: Convolutions, frames: int = 1) -> int:
    """Return the shortest input that gives this many frames; without convolutions, `frames` itself."""
    length = frames
    for kernel, stride in reversed(convolutions):
        length = (length - 1) * stride + kernel
    return length
