"""Cases of image and audio models: odd signals, batches, lengths, and natural examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compileflow.contracts import Arrays, ComponentRecord, TensorRecord
from compileflow.source_model.lengths import call_sizes, frames_of, shortest_input
from compileflow.source_model.processor import Processor
from compileflow.validation.cases.case import Case
from compileflow.validation.cases.generated_signals import NamedSignal, Signal, generated_signals, odd_signals
from compileflow.validation.cases.shapes import Shape, audio_shapes, image_shapes, row_lengths

_BATCH = 8


@dataclass(frozen=True)
class SignalCases:
    """Builds cases for one compiled component.

    Attributes:
        processor: Processor of the source model.
        record: Interface of the component.
    """

    processor: Processor
    record: ComponentRecord

    @property
    def mixes_sizes(self) -> bool:
        """Whether signals of different sizes may share a call: not where answers cannot be cut to each of them."""
        tensors = (*self.record.inputs, *self.record.outputs)
        return not any(axis in ("height", "width", "free") for tensor in tensors for axis in tensor.axes)

    def case(self, name: str, family: str, signals: Sequence[NamedSignal]) -> Case:
        """Build one batch of signals. The processor's mask decides what counts; without one, everything does."""
        arrays = self.processor([signal.values for signal in signals])
        inputs = {record.name: self._cut(record.axes, arrays[record.name]) for record in self.record.inputs}
        names, labels = (tuple(signal.name for signal in signals), tuple(signal.label for signal in signals))
        return Case(name, family, names, inputs, self.output_mask(inputs), truths=labels if any(labels) else ())

    def output_mask(self, inputs: Arrays) -> NDArray[Any]:
        """Return 1 where a frame counts, shape (batch, frames); ones of (batch, 1) if no output has frames."""
        rows, row_length = call_sizes(self.record.inputs[0], inputs[self.record.inputs[0].name])
        if not any("frames" in record.axes for record in self.record.outputs):
            return np.ones((rows, 1), int)
        lengths = inputs["attention_mask"].sum(axis=1) if "attention_mask" in inputs else np.full(rows, row_length)
        rule = self.record.frame_convolutions
        return np.stack(
            [np.arange(frames_of(rule, row_length)) < frames_of(rule, int(length)) for length in lengths]
        ).astype(int)

    def generated(self) -> list[Case]:
        """Build the cases that natural examples do not cover: odd signals, batches, extreme lengths."""
        batch = generated_signals(self.processor, _BATCH)
        if not self.mixes_sizes:
            batch = _cropped(batch)
        cases = [case for signal in odd_signals(self.processor) for case in self._odd(signal)]
        cases.append(self.case("the batch's first row alone", "batch", batch[:1]))
        cases.append(self.case(f"{_BATCH} at once", "batch", batch))
        if "sequence" in self.record.inputs[0].axes:
            cases += [self.case(f"length {length}", "length", [self.noise(length)]) for length in self._lengths()]
        return cases

    def shapes(self) -> tuple[Shape, ...]:
        """Return the (batch size, length) pairs at which both models are compared."""
        main = self.record.inputs[0]
        if "sequence" in main.axes:
            second = call_sizes(main, self._row(np.zeros(self.processor.sampling_rate, np.float32)))[1]
            return audio_shapes(self.record, shortest_input(self.record.frame_convolutions), second)
        return image_shapes(self.record, self._row(generated_signals(self.processor, 1)[0].values).size)

    def shape_cases(self, shapes: Sequence[Shape], seed: int) -> list[Case]:
        """Build the cases of each shape from signals that the seed draws: full rows and rows with padding."""
        signals = generated_signals(self.processor, _BATCH, seed=seed)
        if not self.mixes_sizes:
            signals = _cropped(signals)
        arrays = self.processor([signal.values for signal in signals])
        shortest = shortest_input(self.record.frame_convolutions)
        cases = []
        for rows, length in shapes:
            calls = [[length] * rows]
            if "sequence" in self.record.inputs[0].axes:
                calls = row_lengths(rows, length, shortest, dynamic=self.record.dynamic_axes)
            for number, lengths in enumerate(calls):
                name = f"shape {rows} x {length}" + (", ragged" if number else "")
                inputs = {
                    record.name: _filled(record, arrays[record.name], length, lengths)
                    for record in self.record.inputs
                }
                texts = tuple(f"drawn {row + 1}, {size} long" for row, size in enumerate(lengths))
                cases.append(Case(name, "shape", texts, inputs, self.output_mask(inputs), is_drawn=True))
        return cases

    def _odd(self, signal: NamedSignal) -> list[Case]:
        """Build the case of an odd signal; none where the processor itself refuses it, as a very thin image."""
        try:
            return [self.case(signal.name, "signal", [signal])]
        except (ValueError, ZeroDivisionError, RuntimeError):
            return []

    def natural(self, signals: Sequence[NamedSignal]) -> list[Case]:
        """Build batches of 8 from natural examples, sorted by size; of one size where sizes must not be mixed."""
        ordered = sorted(signals, key=lambda signal: (signal.values.size, signal.values.shape))
        batches = []
        for _, group in groupby(ordered, key=lambda signal: None if self.mixes_sizes else signal.values.shape):
            alike = list(group)
            batches += [alike[start : start + _BATCH] for start in range(0, len(alike), _BATCH)]
        return [
            self.case(f"natural batch {number}", "agreement", batch)
            for number, batch in enumerate(batches, start=1)
        ]

    def noise(self, length: int) -> NamedSignal:
        """Return noise that the processor turns into about `length` elements."""
        rate = self.processor.sampling_rate
        per_second = call_sizes(self.record.inputs[0], self._row(np.zeros(rate, np.float32)))[1]
        samples = max(1, round(length * rate / per_second)) if per_second != rate else length
        return NamedSignal(f"noise, {length}", np.random.default_rng(7).standard_normal(samples, dtype=np.float32))

    def timed(self, rows: int, length: int) -> Case:
        """Build the call for timing one shape."""
        if "sequence" in self.record.inputs[0].axes:
            signal = self.noise(length)
        else:
            signal = generated_signals(self.processor, 1)[0]
        return self.case(f"timed {rows} x {length}", "timed", [signal] * rows)

    def _row(self, signal: Signal) -> NDArray[Any]:
        return self.processor([signal])[self.record.inputs[0].name]

    def _lengths(self) -> list[int]:
        shortest, longest = shortest_input(self.record.frame_convolutions), self.record.max_sequence_length
        edges = {bucket.sequence_length for bucket in self.record.shape_buckets}
        lengths = {shortest, shortest + 1, longest} | {
            length for edge in edges for length in (edge - 1, edge, edge + 1)
        }
        return sorted(length for length in lengths if shortest <= length <= longest)

    def _cut(self, axes: Sequence[Any], values: NDArray[Any]) -> NDArray[Any]:
        if "sequence" not in axes:
            return values
        index = [slice(self.record.max_sequence_length if axis == "sequence" else None) for axis in axes]
        return np.ascontiguousarray(values[tuple(index)])


def _filled(record: TensorRecord, values: NDArray[Any], length: int, lengths: Sequence[int]) -> NDArray[Any]:
    """Return rows of these lengths, padded with zeros to `length`, from rows that repeat and are shifted."""
    axis = record.axes.index("sequence") if "sequence" in record.axes else None
    rows = []
    for number, size in enumerate(lengths):
        # No two rows are equal, so that an exchange of rows shows.
        turns, source_row = divmod(number, len(values))
        row = np.roll(values[source_row], 5 * turns, axis=-1)
        if axis is not None:
            row = np.ones_like(row) if record.name == "attention_mask" else row
            row = np.take(row, np.arange(length) % row.shape[axis - 1], axis=axis - 1)
            row[(slice(None),) * (axis - 1) + (slice(size, None),)] = 0
        rows.append(row)
    return np.stack(rows)


def _cropped(signals: Sequence[NamedSignal]) -> list[NamedSignal]:
    """Crop signals to the largest size that all of them have."""
    crop = tuple(slice(min(sizes)) for sizes in zip(*(signal.values.shape for signal in signals), strict=True))
    return [NamedSignal(signal.name, signal.values[crop]) for signal in signals]
