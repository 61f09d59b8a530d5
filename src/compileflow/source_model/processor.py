"""Images and audio: the source model's processor, and the inputs that it prepares for the model.

transformers is imported inside the functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compileflow.contracts import Arrays, Axis, TensorRecord
from compileflow.errors import SourceError
from compileflow.spec import Modality

# Longest recording, in seconds, of an audio component whose request sets no maximum.
LONGEST_S = 30
_PROBES_S = (1.0, 1.5)
_PROBE_PIXELS = (48, 64)


@dataclass(frozen=True)
class Processor:
    """Image processor or feature extractor of a source model.

    Attributes:
        inner: The transformers object.
        modality: image or audio.
    """

    inner: Any
    modality: Modality

    @property
    def sampling_rate(self) -> int:
        """Samples per second of the audio that the model was trained on; 0 for images."""
        return int(getattr(self.inner, "sampling_rate", 0))

    def __call__(self, signals: Sequence[NDArray[Any]]) -> Arrays:
        """Turn signals into a batch of inputs, padded to the longest.

        Args:
            signals: Images, uint8 (height, width, 3); or audio, float32 (samples,) at `sampling_rate`.
        """
        if self.modality == "image":
            # transformers cannot infer the colour axis of a one-pixel image.
            batch = self.inner(images=list(signals), input_data_format="channels_last", return_tensors="np")
        else:
            batch = self.inner(list(signals), sampling_rate=self.sampling_rate, padding=True, return_tensors="np")
        arrays = {name: np.asarray(value) for name, value in batch.items()}
        return {
            name: value.astype(np.float32 if value.dtype.kind == "f" else np.int64)
            for name, value in arrays.items()
        }


def load_processor(folder: Path, modality: Modality, *, trust_remote_code: bool) -> Processor:
    """Load the processor that turns images or audio into a source model's inputs.

    Raises:
        SourceError: The folder holds no processor that transformers can load.
    """
    from transformers import AutoFeatureExtractor, AutoImageProcessor

    auto_class = AutoImageProcessor if modality == "image" else AutoFeatureExtractor
    try:
        inner = auto_class.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise SourceError(
            f"The source model's {modality} processor cannot be loaded: {str(error).splitlines()[0]}",
            hint="Save the processor (preprocessor_config.json) into the model's folder with save_pretrained.",
        ) from error
    return Processor(inner, modality)


def probe_signals(processor: Processor) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return two signals of different sizes; axes on which their inputs agree are fixed."""
    random = np.random.default_rng(20)
    if processor.modality == "image":
        small_image, large_image = (
            random.integers(0, 256, (side, side, 3), dtype=np.uint8) for side in _PROBE_PIXELS
        )
        return small_image, large_image
    short_sound, long_sound = (
        random.standard_normal(int(seconds * processor.sampling_rate), dtype=np.float32) for seconds in _PROBES_S
    )
    return short_sound, long_sound


def signal_records(processor: Processor, parameters: Iterable[str], model_name: str) -> tuple[TensorRecord, ...]:
    """Return the graph's inputs: those that the processor returns and the model's `forward` takes.

    Args:
        processor: Processor of the source model.
        parameters: Names of the parameters of `forward`.
        model_name: Name of the model class, for error messages.

    Raises:
        SourceError: The processor returns nothing that `forward` takes.
    """
    short_inputs, long_inputs = (processor([signal]) for signal in probe_signals(processor))
    parameter_names = set(parameters)
    records = []
    for name, value in short_inputs.items():
        if name not in parameter_names:
            continue
        axes: list[Axis] = ["batch"]
        for short_size, long_size in zip(value.shape[1:], long_inputs[name].shape[1:], strict=True):
            axes.append(short_size if short_size == long_size else "sequence")
        records.append(TensorRecord(name=name, dtype=str(value.dtype), axes=tuple(axes)))
    if not records:
        raise SourceError(
            f"{model_name}.forward takes none of its processor's inputs: {', '.join(short_inputs)}.",
            hint="Use the processor that was saved with this model.",
        )
    # The signal comes before the mask: its shape is the call's shape.
    return tuple(sorted(records, key=lambda record: record.name.endswith("mask")))


def signal_lengths(processor: Processor, records: Sequence[TensorRecord]) -> tuple[int, int]:
    """Return the lengths of the two probes along the sequence axis; (1, 1) where there is none."""
    if "sequence" not in records[0].axes:
        return 1, 1
    axis = records[0].axes.index("sequence")
    short_length, long_length = (
        processor([signal])[records[0].name].shape[axis] for signal in probe_signals(processor)
    )
    return short_length, long_length


def longest_signal(processor: Processor) -> int:
    """Return the row length of a recording of LONGEST_S seconds; 1 where all signals have the same row length."""
    if processor.modality == "image":
        return 1
    main_input = next(iter(processor([probe_signals(processor)[0]])))
    short_length, long_length = (
        processor([np.zeros(seconds * processor.sampling_rate, np.float32)])[main_input].shape[1]
        for seconds in (1, LONGEST_S)
    )
    return long_length if long_length != short_length else 1
