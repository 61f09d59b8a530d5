"""SharedCalls: rows that wait while a component is busy run together, as the rows of a list do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

from compileflow.contracts import Arrays, ComponentRecord
from compileflow.serving.padding import split_row, stack_rows
from compileflow.serving.rows import plan_batches

# How many of the oldest rows may share the next call. If all could, rows of rare lengths would wait far longer.
_CANDIDATES = 32


class _Row:
    """A row that waits for its turn.

    Attributes:
        inputs: Inputs of the component, one row.
        outputs: Outputs, once another thread has run the row.
        batch: Rows that the thread of this row is to run, this one first; empty if another thread runs it.
        turn: Lock that is released when the row has its outputs, or is to run.
    """

    def __init__(self, inputs: Arrays):
        self.inputs = inputs
        self.outputs: Arrays | None = None
        self.batch: Sequence[_Row] = ()
        self.turn = threading.Lock()
        self.turn.acquire()


class SharedCalls:
    """Runs single rows of many threads: a few calls at once, and in each call the rows that waited for it.

    A row that finds the component idle runs at once and alone. Otherwise it waits. A call that ends wakes the
    thread of the oldest row, which runs its row and those of similar length that wait as well. So no row waits for
    a batch to fill, every row is the oldest in time, and many threads together are as fast as a list.

    Args:
        record: Record of the component. Padding must leave its answers unchanged.
        run: Runs completed inputs of any number of rows.
        at_once: Number of calls that run at the same time.
    """

    def __init__(self, record: ComponentRecord, run: Callable[[Arrays], Arrays], at_once: int):
        self._record = record
        self._run = run
        self._idle = at_once
        self._lock = threading.Lock()
        self._waiting: list[_Row] = []

    def run(self, inputs: Arrays) -> Arrays:
        """Run one row, alone or with others, and return its outputs.

        Raises:
            InputError, MemoryError: The row fails alone; see `LoadedComponent.run`.
        """
        with self._lock:
            row = None if self._idle else _Row(inputs)
            if row is None:
                self._idle -= 1
            else:
                self._waiting.append(row)
        if row is None:
            try:
                return self._run(inputs)
            finally:
                self._pass_on()
        self._wait(row)
        # The row is in its own batch, and such a circle would stay in memory until Python looks for circles.
        batch, row.batch = row.batch, ()
        if batch:
            try:
                self._run_batch(batch)
                if row.outputs is None:
                    row.outputs = self._run(inputs)
            finally:
                self._pass_on()
        # A row whose batch failed runs alone, and raises an error of its own if it has one.
        return self._run(inputs) if row.outputs is None else row.outputs

    def _wait(self, row: _Row) -> None:
        try:
            row.turn.acquire()
        except BaseException:
            # A signal interrupts the main thread; the others must not wait for it.
            with self._lock:
                if row in self._waiting:
                    self._waiting.remove(row)
            if row.batch:
                self._release(row.batch)
                self._pass_on()
            raise

    def _run_batch(self, rows: Sequence[_Row]) -> None:
        try:
            if len(rows) > 1:
                with suppress(Exception):
                    outputs = self._run(stack_rows(self._record, [row.inputs for row in rows]))
                    answers = [
                        split_row(self._record, outputs, position, row.inputs) for position, row in enumerate(rows)
                    ]
                    for row, answer in zip(rows, answers, strict=True):
                        row.outputs = answer
        finally:
            self._release(rows)

    def _release(self, rows: Sequence[_Row]) -> None:
        """Wake the threads of all rows but the first, whose thread is running."""
        for row in rows[1:]:
            row.turn.release()

    def _pass_on(self) -> None:
        """Let the thread of the oldest row run, after a call."""
        with self._lock:
            if not self._waiting:
                self._idle += 1
                return
            oldest_rows = self._waiting[:_CANDIDATES]
            batches = plan_batches(self._record, [row.inputs for row in oldest_rows], batch_size=None, pad=True)
            positions = sorted(next(batch for batch in batches if 0 in batch))
            batch = [oldest_rows[position] for position in positions]
            self._waiting = [row for row in self._waiting if row not in batch]
            batch[0].batch = batch
        batch[0].turn.release()
