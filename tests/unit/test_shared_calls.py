"""Rows of several threads share a call of a busy component: none is lost, mixed up or overtaken for long."""

from __future__ import annotations

import gc
import signal
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compileflow import CompiledPipeline, LightPipeline
from compileflow._process.state import resident_bytes
from compileflow.contracts import Arrays, ComponentRecord, TensorRecord
from compileflow.errors import InputError
from compileflow.serving.shared_calls import SharedCalls
from compileflow.spec import HfTask
from tests.conftest import ModelFactory
from tests.in_process import InProcess
from tests.models import sentences

RECORD = ComponentRecord(
    folder="components/default",
    inputs=tuple(
        TensorRecord(name=name, dtype="int64", axes=("batch", "sequence"))
        for name in ("input_ids", "attention_mask")
    ),
    outputs=(TensorRecord(name="doubled", dtype="int64", axes=("batch", "sequence")),),
    output_class="transformers.modeling_outputs:BaseModelOutput",
    max_sequence_length=16,
    dynamic_axes=True,
    padding="right",
)
WORSE = 99
CLIENTS = 64


class Doubling:
    """Doubles its input; its first calls wait for `gate`, and a call with the number 99 fails."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.gate = threading.Event()
        self.running = self.most_running = 0

    def __call__(self, inputs: Arrays) -> Arrays:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self.shapes.append(inputs["input_ids"].shape)
        self.gate.wait(10)
        self.running -= 1
        if WORSE in inputs["input_ids"]:
            raise InputError("The compiled graph failed.")
        return {"doubled": 2 * inputs["input_ids"]}


def row(*numbers: int) -> Arrays:
    ids = np.array([numbers])
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def waiting(shared: SharedCalls, count: int) -> None:
    """Return when this many rows wait."""
    until(lambda: len(shared._waiting) == count)


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def submitted(executor: ThreadPoolExecutor, shared: SharedCalls, rows: list[Arrays]) -> list[Future[Any]]:
    """Run each row in a thread of its own, in this order; the first is running, and the others wait."""
    futures = []
    for number, inputs in enumerate(rows):
        futures.append(executor.submit(shared.run, inputs))
        waiting(shared, number)
    return futures


def test_row_that_meets_no_other_runs_alone_and_as_it_is() -> None:
    run = Doubling()
    run.gate.set()
    shared = SharedCalls(RECORD, run, 1)
    assert [shared.run(row(*range(length)))["doubled"].tolist() for length in (2, 3)] == [[[0, 2]], [[0, 2, 4]]]
    assert run.shapes == [(1, 2), (1, 3)]


def test_rows_that_wait_share_the_next_call_and_get_their_own_answers() -> None:
    run = Doubling()
    shared = SharedCalls(RECORD, run, 1)
    with ThreadPoolExecutor() as executor:
        futures = submitted(executor, shared, [row(1), row(2, 3), row(4, 5, 6), row(7)])
        run.gate.set()
        answers = [future.result(10)["doubled"].tolist() for future in futures]
    assert answers == [[[2]], [[4, 6]], [[8, 10, 12]], [[14]]]
    assert run.shapes == [(1, 1), (3, 3)]


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function of this module returns in a process of its own.

    The tests before this one leave garbage, memory, timers and threads in the process of the tests.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as executor:
        return executor.submit(function, *arguments).result(timeout=120)


def test_shared_call_leaves_nothing_for_the_garbage_collector() -> None:
    assert alone(_kept_answers) == 0


def _kept_answers() -> int:
    """Return how many answers are alive that nobody holds."""
    run = Doubling()
    shared = SharedCalls(RECORD, run, 1)
    gc.collect()
    gc.disable()
    try:
        with ThreadPoolExecutor() as executor:
            futures = submitted(executor, shared, [row(1), row(2), row(3)])
            run.gate.set()
            kept = [weakref.ref(future.result(10)["doubled"]) for future in futures]
        del futures
        return sum(answer() is not None for answer in kept)
    finally:
        gc.enable()


def test_failing_row_fails_alone() -> None:
    run = Doubling()
    shared = SharedCalls(RECORD, run, 1)
    with ThreadPoolExecutor() as executor:
        futures = submitted(executor, shared, [row(1), row(2), row(WORSE), row(4)])
        run.gate.set()
        with pytest.raises(InputError):
            futures.pop(2).result(10)
        assert [future.result(10)["doubled"].tolist() for future in futures] == [[[2]], [[4]], [[8]]]
    assert shared.run(row(5))["doubled"].tolist() == [[10]]


@pytest.mark.parametrize("at_once", [1, 2])
def test_only_so_many_calls_run_at_once(at_once: int) -> None:
    run = Doubling()
    run.gate.set()
    shared = SharedCalls(RECORD, run, at_once)
    rows = [row(*range(1 + number % 7)) for number in range(400)]
    with ThreadPoolExecutor(16) as executor:
        answers = list(executor.map(shared.run, rows))
    expected = [(2 * inputs["input_ids"]).tolist() for inputs in rows]
    assert [answer["doubled"].tolist() for answer in answers] == expected
    assert run.most_running <= at_once


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer that interrupts the main thread")
def test_interrupted_wait_stops_no_other_row() -> None:
    assert alone(_answers_beside_an_interrupted_row) == [[[2]], [[6]]]


def _answers_beside_an_interrupted_row() -> list[Any]:
    """Interrupt a row that waits, and return the answers of the others."""

    def interrupt(*_: Any) -> None:
        raise TimeoutError

    run = Doubling()
    shared = SharedCalls(RECORD, run, 1)
    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        with ThreadPoolExecutor() as executor:
            first = executor.submit(shared.run, row(1))
            until(lambda: run.running == 1)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(TimeoutError):
                shared.run(row(2))
            second = executor.submit(shared.run, row(3))
            waiting(shared, 1)
            run.gate.set()
            return [future.result(10)["doubled"].tolist() for future in (first, second)]
    finally:
        signal.signal(signal.SIGALRM, previous)


@pytest.mark.parametrize("kind", [LightPipeline, CompiledPipeline])
@pytest.mark.parametrize("target", ["onnx-runtime", "openvino"])
def test_many_clients_get_the_answers_of_one_and_need_no_more_memory(
    tiny_model: ModelFactory, in_process: InProcess, kind: Any, target: str
) -> None:
    hf_task = HfTask.FEATURE_EXTRACTION
    folder = in_process.compiled(tiny_model(hf_task), target, hf_task)
    growth, difference = alone(_many_clients, kind, folder)
    # The heaps of the threads grow a little; benchmarks/exp_concurrency.py measures 100,000 requests.
    assert growth < 0.1
    assert difference < 1e-5


def _many_clients(kind: Any, folder: Path) -> tuple[float, float]:
    """Return by what fraction 2,000 requests of many clients raise the memory, and their largest difference."""
    pipeline = kind.from_pretrained(folder, task="sentence-similarity", threads=1)
    # Otherwise no row would be padded to the length of another.
    assert pipeline.model.graph.record.padding == "right"
    texts = sentences()
    single_answers = [pipeline(text) for text in texts]
    requests = [number % len(texts) for number in range(2000)]
    with ThreadPoolExecutor(CLIENTS) as executor:

        def answers() -> list[Any]:
            return list(executor.map(lambda number: pipeline(texts[number]), requests))

        answers()
        before = resident_bytes()
        together = answers()
        growth = resident_bytes() / before - 1
    pairs = zip(requests, together, strict=True)
    difference = max(float(np.abs(embedding - single_answers[number]).max()) for number, embedding in pairs)
    pipeline.model.close()
    return growth, difference
