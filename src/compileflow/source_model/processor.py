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
from compileflow.errors import SourceError, first_line
from compileflow.spec import Modality

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
# Longest recording, in seconds, of an audio component whose request sets no maximum.
LONGEST_S = 30
_PROBES_S = (1.0, 1.5)
# Height and width of images that differ in size and in aspect ratio: an axis on which their inputs agree is fixed.
_PROBE_PIXELS = ((64, 96), (200, 72), (80, 80), (48, 120))
# Inputs that hold the shape of each image.
_SHAPES = ("image_sizes", "spatial_shapes")


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
        """Turn signals into a batch of inputs: each one alone, as transformers' pipelines call the processor.

        Args:
            signals: Images, uint8 (height, width, 3), whose inputs must have one size; or audio at
                `sampling_rate`, float32 (samples,), whose shorter rows are padded with zeros.
        """
        rows = [self._row(signal) for signal in signals]
        return {name: _stacked([row[name] for row in rows]) for name in rows[0]}

    def _row(self, signal: NDArray[Any]) -> Arrays:
        if self.modality == "image":
            # transformers cannot infer the colour axis of a one-pixel image.
            row = self.inner(images=[signal], input_data_format="channels_last", return_tensors="np")
        else:
            row = self.inner(signal, sampling_rate=self.sampling_rate, return_tensors="np")
        arrays = {name: np.asarray(value) for name, value in row.items()}
        return {
            name: value.astype(np.float32 if value.dtype.kind == "f" else np.int64)
            for name, value in arrays.items()
            if value.dtype.kind in "fiub"
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
    except Exception as error:
        check_processor_files(folder, modality)
        # Without the path of the folder, a temporary copy.
        raise _unusable(modality, first_line(error).replace(str(folder), "the model's folder")) from error
    return Processor(inner, modality)


def check_processor_files(folder: Path, modality: Modality) -> None:
    """Check that a folder holds the configuration of a processor.

    Raises:
        SourceError: It does not.
    """
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        raise _unusable(modality, f"{PROCESSOR_FILES[0]} is missing")


def _unusable(modality: Modality, reason: str) -> SourceError:
    return SourceError(
        f"The source model's {modality} processor cannot be loaded: {reason}.",
        hint="Save the processor (preprocessor_config.json) into the model's folder with save_pretrained.",
    )


def probe_signals(processor: Processor) -> list[NDArray[Any]]:
    """Return signals of different sizes; axes on which the inputs of all agree are fixed."""
    random = np.random.default_rng(20)
    if processor.modality == "image":
        return [random.integers(0, 256, (*pixels, 3), dtype=np.uint8) for pixels in _PROBE_PIXELS]
    rate = processor.sampling_rate
    return [random.standard_normal(int(seconds * rate), dtype=np.float32) for seconds in _PROBES_S]


def signal_records(
    processor: Processor, parameters: Iterable[str], model_name: str, *, ignored_inputs: Sequence[str] = ()
) -> tuple[TensorRecord, ...]:
    """Return the graph's inputs: those that the processor returns and the model's `forward` takes.

    Args:
        processor: Processor of the source model.
        parameters: Names of the parameters of `forward`.
        model_name: Name of the model class, for error messages.
        ignored_inputs: Names of inputs that the graph does not take.

    Raises:
        SourceError: The processor returns nothing that `forward` takes, or inputs with more or fewer rows than
            images.
    """
    rows = [processor([signal]) for signal in probe_signals(processor)]
    parameter_names = set(parameters) - set(ignored_inputs)
    records = []
    for name, value in rows[0].items():
        if name not in parameter_names:
            continue
        shapes = {row[name].shape for row in rows}
        if any(len(shape) != value.ndim or shape[0] != 1 for shape in shapes):
            raise SourceError(
                f"Expected one row of {name} for one {processor.modality} from the processor of {model_name}, got "
                f"the shapes {', '.join(map(str, sorted(shapes)))}.",
                hint="compileflow compiles models that take one row for one input.",
            )
        sizes = list(zip(*shapes, strict=True))[1:]
        axes = [
            axis_sizes[0] if len(set(axis_sizes)) == 1 else _free_axis(processor.modality, position - len(sizes))
            for position, axis_sizes in enumerate(sizes)
        ]
        records.append(TensorRecord(name=name, dtype=str(value.dtype), axes=("batch", *axes)))
    if any(record.name in _SHAPES for record in records):
        raise SourceError(
            f"{model_name} takes the shape of each image as an input and computes with it in Python, which a "
            "graph cannot record.",
            hint="Use a model of the family whose images have one size.",
        )
    if not records:
        raise SourceError(
            f"{model_name}.forward takes none of its processor's inputs: {', '.join(rows[0])}.",
            hint="Use the processor that was saved with this model.",
        )
    # The signal comes before the mask: its shape is the call's shape.
    return tuple(sorted(records, key=lambda record: record.name.endswith("mask")))


def single_image_records(
    processor: Processor, parameters: Iterable[str], model_name: str
) -> tuple[TensorRecord, ...]:
    """Return the inputs for one image of a model that compares it with a batch of texts.

    Raises:
        SourceError: The processor gives images of different sizes.
    """
    records = signal_records(processor, parameters, model_name)
    if any(axis in ("height", "width") for record in records for axis in record.axes):
        raise SourceError(
            f"The processor of {model_name} keeps the aspect ratio, but the graph takes images of one size.",
            hint="Let the processor crop, or set size to a height and a width in preprocessor_config.json.",
        )
    return tuple(record.model_copy(update={"axes": (1, *record.axes[1:])}) for record in records)


def image_inputs(
    processor: Processor, records: Sequence[TensorRecord], batch_size: int, *, probe: int = 0
) -> Arrays:
    """Return the inputs of a batch of random images that all have the size of a probe image."""
    random = np.random.default_rng(21)
    images = [random.integers(0, 256, (*_PROBE_PIXELS[probe], 3), dtype=np.uint8) for _ in range(batch_size)]
    arrays = processor(images)
    return {record.name: arrays[record.name] for record in records}


def image_sizes(processor: Processor) -> tuple[tuple[int, int], ...]:
    """Return the different sizes, (height, width), that the processor gives to images of different sizes."""
    shapes = [next(iter(processor([image]).values())).shape for image in probe_signals(processor)]
    return tuple(dict.fromkeys((shape[-2], shape[-1]) for shape in shapes))


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
    short_input, long_input = (
        next(iter(processor([np.zeros(seconds * processor.sampling_rate, np.float32)]).values()))
        for seconds in (1, LONGEST_S)
    )
    sizes = zip(short_input.shape, long_input.shape, strict=True)
    return next((long_size for short_size, long_size in sizes if short_size != long_size), 1)


def _free_axis(modality: Modality, position: int) -> Axis:
    """Name an axis whose size follows from the signal; `position` counts from the last axis, -1."""
    if modality == "audio":
        return "sequence"
    return "width" if position == -1 else "height"


def _stacked(values: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Stack rows of shape (1, ...); shorter ones are padded with zeros at the end of each axis."""
    sizes = tuple(map(max, zip(*(value.shape for value in values), strict=True)))
    return np.concatenate(
        [
            np.pad(value, [(0, size - length) for size, length in zip(sizes, value.shape, strict=True)])
            for value in values
        ]
    )
