"""Contention: a busy machine is noticed, a quiet one is not, and a disturbed measurement is repeated or marked."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest

from compileflow.contracts import Arrays
from compileflow.validation.measure import Measurements, latency, measure_latency
from compileflow.validation.measure.contention import Sample, disturbance, take_sample
from compileflow.validation.measure.latency import Stopwatch
from compileflow.validation.measure.measurements import Model

QUIET = Sample(wall_s=10.0, own_cpu_s=5.0, all_cpu_s=1000.0, spin_s=0.0051, spin_cpu_s=0.0047)


def later(
    seconds: float, own_s: float, all_s: float | None, *, spin_s: float = 0.0051, spin_cpu_s: float = 0.0047
) -> Sample:
    """Return a sample some seconds after QUIET, with the processor time that was used since."""
    return Sample(
        wall_s=QUIET.wall_s + seconds,
        own_cpu_s=QUIET.own_cpu_s + own_s,
        all_cpu_s=None if all_s is None else 1000.0 + all_s,
        spin_s=spin_s,
        spin_cpu_s=spin_cpu_s,
    )


@pytest.mark.parametrize(
    "after",
    [
        # All processor time is this process's own, but for a few ticks of a daemon.
        later(0.88, 1.61, 1.66),
        later(2.1, 4.0, 4.1),
        # A short measurement: the counters tick every 10 ms.
        later(0.05, 0.06, 0.08),
        # The system does not tell.
        later(1.0, 1.9, None),
        # Nothing has passed.
        QUIET,
    ],
)
def test_quiet_machine_is_not_marked(after: Sample) -> None:
    assert disturbance([QUIET, after], 2, ratios=[[0.5, 0.52, 0.49, 0.55, 0.47]], processors=2) == ""


@pytest.mark.parametrize(
    ("threads", "processors", "marked"),
    [
        (2, 2, True),
        (1, 1, True),
        # The other process has a processor of its own.
        (1, 2, False),
        (2, 16, False),
        (16, 16, True),
    ],
)
def test_processors_that_others_hold_are_missing_only_if_the_models_need_them(
    threads: int, processors: int, marked: bool
) -> None:
    text = disturbance([QUIET, later(2.0, 2.0, 3.8)], threads, processors=processors)
    assert text == (f"other processes used 0.9 of {processors} processors" if marked else "")


def test_work_that_waits_for_a_processor_marks_before_and_after() -> None:
    # Recorded on two processors, each with a process that computes.
    busy = later(0.0, 0.0, 0.0, spin_s=0.0473, spin_cpu_s=0.0047)
    assert disturbance([busy], 2) == "a fixed piece of work took 10.1 times its processor time"
    assert disturbance([QUIET, later(1.0, 1.0, None, spin_s=0.0141)], 2) == (
        "a fixed piece of work took 2.0 times its processor time"
    )


def test_processor_that_slows_down_marks() -> None:
    slower = later(1.0, 1.0, 1.0, spin_s=0.0102, spin_cpu_s=0.0094)
    assert disturbance([QUIET, slower], 2) == "the processor became slower by a factor of 2.0"


def test_pairs_that_disagree_mark() -> None:
    # Recorded beside other work, with two threads: 1.46, 0.21, 0.22, ...
    text = disturbance([QUIET, later(0.9, 0.9, None)], 2, ratios=[[0.21, 1.46, 0.25, 0.19, 1.2]])
    assert text == "the middle half of the pairs spreads over 396 % of their median"
    # Each candidate of a race counts.
    assert disturbance([QUIET, QUIET], 2, ratios=[[0.5] * 5, [0.21, 1.46, 0.25, 0.19, 1.2]]) == text


def test_disturbed_measurement_is_repeated_until_it_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    # Busy before the first start; quiet before the second, busy after it; then quiet.
    answers = iter(("busy", "", "busy", "", ""))
    monkeypatch.setattr(latency, "disturbance", lambda *_, **__: next(answers))
    stopwatch = Stopwatch(1)
    times, busy = stopwatch.time([lambda: None, lambda: None], rounds=5, budget_s=1.0)
    assert times is not None
    assert (len(times.wall_s), busy, stopwatch.repeats) == (5, "", 0)


def test_repetitions_end_and_are_shared_by_all_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    questions = []
    monkeypatch.setattr(latency, "disturbance", lambda *_, **__: questions.append(1) or "busy")
    stopwatch = Stopwatch(1)
    assert [stopwatch.time([lambda: None], rounds=5, budget_s=1.0) for _ in range(2)] == [(None, "busy")] * 2
    assert len(questions) == 4


def _measured(monkeypatch: pytest.MonkeyPatch, busy: str) -> tuple[Measurements, list[str]]:
    """Measure two empty models, and return the names of the models that were called."""
    calls: list[str] = []

    def model(name: str) -> Model:
        def run(inputs: Arrays) -> Arrays:
            calls.append(name)
            return inputs

        return run

    @contextmanager
    def one_thread() -> Iterator[tuple[Model, Model]]:
        yield model("source, one thread"), model("compiled, one thread")

    monkeypatch.setattr(latency, "disturbance", lambda *_, **__: busy)
    measurements = Measurements()
    measure_latency(
        measurements,
        model("source"),
        model("compiled"),
        lambda rows, length: {"input_ids": np.zeros((rows, length), np.int64)},
        shapes=[(1, 8), (2, 8)],
        pairs=5,
        threads=2,
        one_thread=one_thread,
    )
    return measurements, calls


def test_latency_of_a_busy_machine_is_marked_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    measurements, calls = _measured(monkeypatch, "other processes used 1.9 of 2 processors")
    assert [timing.busy for timing in measurements.latencies] == [
        "other processes used 1.9 of 2 processors; timed with one thread"
    ] * 2
    assert "latency_ratio" not in measurements.scalars
    assert measurements.figures() == {"latency_on_busy_machine": 1.0}
    # Many threads that wait for one another would take minutes: they are not timed at all.
    assert calls.count("source") == 0


def test_latency_of_a_quiet_machine_is_used_with_processor_time_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    measurements, calls = _measured(monkeypatch, "")
    assert [timing.busy for timing in measurements.latencies] == ["", ""]
    assert measurements.scalars["latency_ratio"] == measurements.latencies[0].ratio
    assert measurements.figures()["latency_cpu_ratio"] == measurements.latencies[0].cpu_ratio
    assert "latency_on_busy_machine" not in measurements.figures()
    # Two threads use processor time while they wait, so it is measured with one, at the first shape.
    assert measurements.latencies[1].cpu_ratio is None
    assert calls.count("source, one thread") == calls.count("compiled, one thread") > 0


def _compute_for_ever() -> None:
    while True:
        pass


@pytest.fixture
def busy_processors() -> Iterator[None]:
    """Keep every processor busy with two child processes, as long as the test runs."""
    workers = [
        multiprocessing.get_context("fork").Process(target=_compute_for_ever, daemon=True)
        for _ in range(2 * (os.cpu_count() or 1))
    ]
    for worker in workers:
        worker.start()
    yield
    for worker in workers:
        worker.kill()
        worker.join()


@pytest.mark.usefixtures("busy_processors")
def test_machine_with_busy_processors_is_noticed() -> None:
    threads = os.cpu_count() or 1
    before = take_sample(threads)
    for _ in range(20):
        np.linalg.svd(np.random.default_rng(0).normal(size=(80, 80)))
    assert disturbance([before, take_sample(threads)], threads) != ""


@pytest.mark.usefixtures("busy_processors")
def test_ratio_on_busy_processors_is_right_or_marked_and_unused() -> None:
    def model(iterations: int) -> Model:
        return lambda inputs: {
            "answer": np.frombuffer(
                hashlib.pbkdf2_hmac("sha256", b"password", b"a salt of 16 byt", iterations), np.uint8
            )
        }

    source, compiled = model(8_000), model(4_000)
    measurements = Measurements()
    measure_latency(
        measurements,
        source,
        compiled,
        lambda rows, length: {"input_ids": np.zeros((rows, length), np.int64)},
        shapes=[(1, 8)],
        pairs=9,
        threads=os.cpu_count() or 1,
        one_thread=lambda: nullcontext((source, compiled)),
    )
    (timing,) = measurements.latencies
    # The compiled model does half of the source model's work.
    assert timing.cpu_ratio == pytest.approx(0.5, rel=0.25)
    assert timing.busy or timing.ratio == pytest.approx(0.5, rel=0.25)
    assert ("latency_ratio" in measurements.figures()) == (not timing.busy)
