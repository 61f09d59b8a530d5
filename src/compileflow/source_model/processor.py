"""Images and audio as a graph takes them: what the source model's own processor makes of them, and its axes.

torch and transformers are imported inside the functions.
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

# What a graph of audio is compiled for where nobody says: half a minute a call.
LONGEST_S = 30
_PROBES_S = (1.0, 1.5)
_PROBE_PIXELS = (48, 64)


@dataclass(frozen=True)
class Processor:
    """A source model's own image processor or feature extractor.

    Attributes:
        inner: transformers' object.
        modality: image or audio.
    """

    inner: Any
    modality: Modality

    @property
    def sampling_rate(self) -> int:
        """Samples a second that the model was trained on; images: 0."""
        return int(getattr(self.inner, "sampling_rate", 0))

    def __call__(self, signals: Sequence[NDArray[Any]]) -> Arrays:
        """Turn signals into a batch of inputs, padded to the longest.

        Args:
            signals: Images, uint8 (height, width, 3); or audio, float32 (samples,) at `sampling_rate`.
        """
        if self.modality == "image":
            # Of one pixel nobody could tell which axis is colour.
            made = self.inner(images=list(signals), input_data_format="channels_last", return_tensors="np")
        else:
            made = self.inner(list(signals), sampling_rate=self.sampling_rate, padding=True, return_tensors="np")
        arrays = {name: np.asarray(value) for name, value in made.items()}
        return {
            name: value.astype(np.float32 if value.dtype.kind == "f" else np.int64)
            for name, value in arrays.items()
        }


def load_processor(folder: Path, modality: Modality, *, trust_remote_code: bool) -> Processor:
    """Load what turns images or audio into a source model's inputs.

    Raises:
        SourceError: its folder has none.
    """
    from transformers import AutoFeatureExtractor, AutoImageProcessor

    kind = AutoImageProcessor if modality == "image" else AutoFeatureExtractor
    try:
        inner = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise SourceError(
            f"The source model's {modality} processor cannot be loaded: {str(error).splitlines()[0]}",
            hint="Save it into the model's folder, with save_pretrained: preprocessor_config.json.",
        ) from error
    return Processor(inner, modality)


def probe_signals(processor: Processor) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return two signals of different sizes: what their inputs have in common is fixed."""
    random = np.random.default_rng(20)
    if processor.modality == "image":
        small, large = (random.integers(0, 256, (side, side, 3), dtype=np.uint8) for side in _PROBE_PIXELS)
        return small, large
    short, long = (
        random.standard_normal(int(seconds * processor.sampling_rate), dtype=np.float32) for seconds in _PROBES_S
    )
    return short, long


def signal_records(processor: Processor, parameters: Iterable[str], model_name: str) -> tuple[TensorRecord, ...]:
    """Return the graph's inputs: what the processor makes and the model's forward takes.

    Args:
        processor: The source model's own.
        parameters: Names that forward takes.
        model_name: For errors.

    Raises:
        SourceError: they share no name.
    """
    first, second = (processor([signal]) for signal in probe_signals(processor))
    wanted = set(parameters)
    records = []
    for name, value in first.items():
        if name not in wanted:
            continue
        axes: list[Axis] = ["batch"]
        for a, b in zip(value.shape[1:], second[name].shape[1:], strict=True):
            axes.append(a if a == b else "sequence")
        records.append(TensorRecord(name=name, dtype=str(value.dtype), axes=tuple(axes)))
    if not records:
        raise SourceError(
            f"{model_name}.forward takes none of {', '.join(first)}, which the model's processor makes.",
            hint="Use the processor that was saved with this model.",
        )
    # The signal first: its shape is the call's shape.
    return tuple(sorted(records, key=lambda record: record.name.endswith("mask")))


def signal_lengths(processor: Processor, records: Sequence[TensorRecord]) -> tuple[int, int]:
    """Return the two probes' lengths along the sequence axis; 1 where there is none."""
    if "sequence" not in records[0].axes:
        return 1, 1
    axis = records[0].axes.index("sequence")
    short, long = (processor([signal])[records[0].name].shape[axis] for signal in probe_signals(processor))
    return short, long


def longest_signal(processor: Processor) -> int:
    """Return the length of a row that half a minute gives; 1 where all signals give rows of one size."""
    if processor.modality == "image":
        return 1
    main = next(iter(processor([probe_signals(processor)[0]])))
    short, long = (
        processor([np.zeros(seconds * processor.sampling_rate, np.float32)])[main].shape[1]
        for seconds in (1, LONGEST_S)
    )
    return long if long != short else 1
