"""Latency: models timed in turn, so that a slow moment affects all of them, and marked if the machine was busy."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from compileflow.contracts import Arrays
from compileflow.validation.measure.contention import BUSY_MACHINE, disturbance, settle, take_sample
from compileflow.validation.measure.measurements import Latency, Measurements, Model, candidate_answer

_RESAMPLES, _SEED = 2000, 7
# Seconds at each shape, and the fewest rounds however long they take: with all threads, and with one thread.
_BUDGET_S, _ONE_THREAD_BUDGET_S = 0.6, 0.3
_FEWEST, _FEWEST_ONE_THREAD = 5, 3
# Warm-up of each model ends after three calls or after this time.
_WARM_UP_S = 0.1
# Untimed calls come before a call that is shorter.
_LONG_S = 0.02
# Seconds before a disturbed measurement is repeated.
_PATIENCE_S = 0.5

Call = Callable[[], object]
# Gives the source model and the compiled model with one thread each.
OneThread = Callable[[], AbstractContextManager[tuple[Model, Model]]]


@dataclass(frozen=True)
class Rounds:
    """Seconds of each call: one row per round, one column per model.

    Attributes:
        wall_s: Wall time.
        cpu_s: Processor time of all threads.
    """

    wall_s: NDArray[np.float64]
    cpu_s: NDArray[np.float64]

    def latency(self, shape: str, position: int = 1, *, busy: str = "") -> Latency:
        """Return the latency of one model relative to the first, the source model.

        The interval is the percentile bootstrap of the median ratio (B. Efron, 1979, Annals of Statistics 7,
        1-26).
        """
        from scipy.stats import bootstrap

        ratios = self.wall_s[:, position] / self.wall_s[:, 0]
        # Zero where the system updates its counters more rarely than the calls end.
        cpu_s = self.cpu_s.min(axis=0)
        interval = bootstrap(
            (ratios,), np.median, n_resamples=_RESAMPLES, method="percentile", rng=np.random.default_rng(_SEED)
        ).confidence_interval
        return Latency(
            shape=shape,
            reference_p50_ms=float(np.median(self.wall_s[:, 0]) * 1e3),
            candidate_p50_ms=float(np.median(self.wall_s[:, position]) * 1e3),
            ratio=float(np.median(ratios)),
            ratio_low=float(interval.low),
            ratio_high=float(interval.high),
            pairs=len(ratios),
            # Other processes only add to processor time, because they empty the caches.
            cpu_ratio=float(cpu_s[position] / cpu_s[0]) if cpu_s.all() else None,
            busy=busy,
        )


@dataclass
class Stopwatch:
    """Times models, and repeats what other processes disturbed.

    Attributes:
        threads: Number of threads of the models.
        repeats: Number of repetitions that are left, over all shapes.
    """

    threads: int
    repeats: int = 2

    def time(self, calls: Sequence[Call], *, rounds: int, budget_s: float) -> tuple[Rounds | None, str]:
        """Time calls in turn.

        Returns:
            The times, and what disturbed them in words. None instead of times means that the machine was busy
            before the start, when threads that wait for one another would take minutes.
        """
        while True:
            times = None
            before = take_sample(self.threads)
            busy = disturbance([before], self.threads)
            if not busy:
                times = time_rounds(calls, rounds=rounds, budget_s=budget_s)
                ratios = (times.wall_s[:, 1:] / times.wall_s[:, :1]).T
                busy = disturbance([before, take_sample(self.threads)], self.threads, ratios=ratios)
            if not busy or not self.repeats:
                return times, busy
            self.repeats -= 1
            time.sleep(_PATIENCE_S)


def measure_latency(
    measurements: Measurements,
    reference: Model,
    candidate: Model,
    timed: Callable[[int, int], Arrays],
    *,
    shapes: Sequence[tuple[int, int]],
    pairs: int,
    threads: int,
    one_thread: OneThread | None,
    written_tokens: int = 0,
) -> None:
    """Time both models at each shape, (batch size, length). A shape that the candidate refuses becomes a note.

    On a busy machine, threads wait for threads that have no processor, and eager PyTorch slows down more than a
    compiled model. The models are then timed with one thread, and the latency is marked.

    Args:
        measurements: Gets the latencies, and the ratio at the first shape.
        reference: Source model with `threads` threads.
        candidate: Compiled model with `threads` threads.
        timed: Function from a batch size and a length to inputs.
        shapes: Shapes to time.
        pairs: Number of pairs at each shape.
        threads: Number of threads of both models.
        one_thread: Gives both models with one thread. None if the compiled model runs on a device: processor time
            then says nothing about it.
        written_tokens: Tokens that each row of a call gets; 0 if a call writes none.
    """
    inputs_by_shape: dict[str, Arrays] = {}
    for batch_size, length in shapes:
        inputs = timed(batch_size, length)
        # The examples may be shorter than the requested length.
        shape = f"{batch_size} x {inputs['input_ids'].shape[1] if 'input_ids' in inputs else length}"
        error_text = candidate_answer(candidate, inputs)[1]
        if error_text:
            measurements.notes.append(f"{shape} was not timed: {error_text}")
        else:
            inputs_by_shape[shape] = inputs
    if not inputs_by_shape:
        return
    stopwatch = Stopwatch(threads)
    timings = {
        shape: stopwatch.time(_calls((reference, candidate), inputs), rounds=pairs, budget_s=_BUDGET_S)
        for shape, inputs in inputs_by_shape.items()
    }
    if one_thread is None:
        for shape, (times, busy) in timings.items():
            if times is None:
                calls = _calls((reference, candidate), inputs_by_shape[shape])
                times = time_rounds(calls, rounds=_FEWEST_ONE_THREAD, budget_s=0.0)
            measurements.latencies.append(replace(times.latency(shape, busy=busy), cpu_ratio=None))
    else:
        measurements.latencies += _with_one_thread(
            inputs_by_shape, timings, one_thread, threads=threads, pairs=pairs
        )
    measurements.latencies = [
        replace(latency, written_tokens=written_tokens) for latency in measurements.latencies
    ]
    headline = measurements.latencies[0]
    if headline.busy:
        measurements.unusable["latency_ratio"] = f"{BUSY_MACHINE} ({headline.busy})"
    else:
        measurements.scalars["latency_ratio"] = headline.ratio


def time_pairs(shape: str, reference: Call, candidate: Call, *, pairs: int, budget_s: float) -> Latency:
    """Call two models in turn, after a warm-up, and return the latency of the second relative to the first.

    Args:
        shape: Name of the shape that is timed.
        reference: Function that calls the source model once.
        candidate: Function that calls the compiled model once.
        pairs: Number of pairs to time.
        budget_s: Seconds after which fewer pairs are enough; at least 5 are always timed.
    """
    return time_rounds((reference, candidate), rounds=pairs, budget_s=budget_s).latency(shape)


def time_rounds(calls: Sequence[Call], *, rounds: int, budget_s: float, fewest: int = _FEWEST) -> Rounds:
    """Call several models in turn, after a warm-up.

    Args:
        calls: Functions that call one model once; the first calls the source model.
        rounds: Number of rounds to time.
        budget_s: Seconds after which fewer rounds are enough.
        fewest: Number of rounds that are timed however long they take.
    """
    lengths, warm_up_s = [0.0] * len(calls), [0.0] * len(calls)
    for _ in range(3):
        for position, call in enumerate(calls):
            if warm_up_s[position] < _WARM_UP_S:
                start = time.perf_counter()
                call()
                lengths[position] = time.perf_counter() - start
                warm_up_s[position] += lengths[position]
    rows: list[list[tuple[float, float]]] = []
    end = time.perf_counter() + budget_s
    while len(rows) < rounds and (len(rows) < fewest or time.perf_counter() < end):
        # A later call finds warm caches, so the order changes with every round.
        order = range(len(calls)) if len(rows) % 2 == 0 else reversed(range(len(calls)))
        times = {position: _times(calls[position], is_long=lengths[position] > _LONG_S) for position in order}
        rows.append([times[position] for position in range(len(calls))])
    values = np.asarray(rows)
    return Rounds(values[:, :, 0], values[:, :, 1])


def _with_one_thread(
    inputs_by_shape: Mapping[str, Arrays],
    timings: Mapping[str, tuple[Rounds | None, str]],
    one_thread: OneThread,
    *,
    threads: int,
    pairs: int,
) -> list[Latency]:
    """Add the processor time with one thread at the first shape, and replace what was disturbed."""
    latencies = []
    first_shape = next(iter(timings))
    with one_thread() as models:
        for shape, (times, busy) in timings.items():
            latency = times.latency(shape) if times is not None and not busy else None
            if latency is None or (shape == first_shape and threads > 1):
                alone = time_rounds(
                    _calls(models, inputs_by_shape[shape]),
                    rounds=pairs,
                    budget_s=_ONE_THREAD_BUDGET_S,
                    fewest=_FEWEST_ONE_THREAD,
                ).latency(shape, busy=busy and f"{busy}; timed with one thread")
                latency = alone if latency is None else replace(latency, cpu_ratio=alone.cpu_ratio)
            elif threads > 1:
                # Threads use processor time also while they wait for one another.
                latency = replace(latency, cpu_ratio=None)
            latencies.append(latency)
    return latencies


def _calls(models: Sequence[Model], inputs: Arrays) -> list[Call]:
    return [partial(model, inputs) for model in models]


def _times(call: Call, *, is_long: bool) -> tuple[float, float]:
    """Return wall time and processor time of one call; untimed calls come first, unless they are long."""
    settle()
    if not is_long:
        call()
        call()
    start, cpu_start = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - start, time.process_time() - cpu_start
