"""Cases of image and audio models: odd signals, batches, lengths, and natural examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compileflow.contracts import Arrays, ComponentRecord
from compileflow.source_model.lengths import call_sizes, frames_of, shortest_input
from compileflow.source_model.processor import Processor
from compileflow.validation.cases.case import Case
from compileflow.validation.cases.generated_signals import NamedSignal, Signal, generated_signals, odd_signals

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
        return Case(name, family, tuple(signal.name for signal in signals), inputs, self.output_mask(inputs))

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
        cases += [self.case(f"{rows} at once", "batch", batch[:rows]) for rows in (2, 3, _BATCH)]
        cases.append(self.case("the batch's first row alone", "batch", batch[:1]))
        if "sequence" in self.record.inputs[0].axes:
            cases += [self.case(f"length {length}", "length", [self.noise(length)]) for length in self._lengths()]
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

    def timed(self, rows: int, length: int) -> Arrays:
        """Return the inputs for timing one shape."""
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
        lengths = {shortest, shortest + 1, longest} | {
            length for edge in edges for length in (edge - 1, edge, edge + 1)
        }
        return sorted(length for length in lengths if shortest <= length <= longest)

    def _cut(self, axes: Sequence[Any], values: NDArray[Any]) -> NDArray[Any]:
        if "sequence" not in axes:
            return values
        index = [slice(self.record.max_sequence_length if axis == "sequence" else None) for axis in axes]
        return np.ascontiguousarray(values[tuple(index)])


def _cropped(signals: Sequence[NamedSignal]) -> list[NamedSignal]:
    """Crop signals to the largest size that all of them have."""
    crop = tuple(slice(min(sizes)) for sizes in zip(*(signal.values.shape for signal in signals), strict=True))
    return [NamedSignal(signal.name, signal.values[crop]) for signal in signals]
