"""Contention: whether other processes took processor time from a measurement."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

BUSY_MACHINE = "measured on a busy machine"

# Limits. On a quiet machine the spin takes 1.0 to 1.2 times its processor time. Beside a process that computes on
# each of two processors it takes 3 to 10 times as long, and other processes hold 1.7 processors.
_MOST_STRETCH = 1.5
_MOST_DRIFT = 1.3
_MOST_MISSING = 0.25
# Interquartile range of the pairs' ratios, as a share of their median: 0.02 to 0.2 without a disturbance.
_MOST_SPREAD = 0.5
# Seconds between two looks at the processor time of idle threads, and the longest wait for them.
_STEP_S, _LONGEST_WAIT_S = 0.004, 0.1
# PBKDF2 releases Python's global lock, and its work is always the same: about 5 ms.
_SPIN_ITERATIONS = 20_000
# Precision of the system's counters of processor time.
_TICKS_S = 0.02


@dataclass(frozen=True)
class Sample:
    """What the machine's counters say at one moment, and a calibrated spin.

    Attributes:
        wall_s: Time of the sample.
        own_cpu_s: Processor time of this process.
        all_cpu_s: Processor time of all processes, with what a hypervisor took; None if the system does not tell.
        spin_s: Wall time of a fixed piece of work on each of the threads at once.
        spin_cpu_s: Processor time of that work, on the thread that needed least.
    """

    wall_s: float
    own_cpu_s: float
    all_cpu_s: float | None
    spin_s: float
    spin_cpu_s: float


def take_sample(threads: int) -> Sample:
    """Spin on `threads` threads, then read the counters."""
    settle()
    # A single interruption is not yet contention.
    spin_s, spin_cpu_s = min(_spin(threads), _spin(threads))
    return Sample(time.perf_counter(), time.process_time(), _all_cpu_s(), spin_s, spin_cpu_s)


def settle() -> None:
    """Wait until the threads of the last call sleep.

    After a call they look for the next one without sleep, those of PyTorch for 10 ms, those of onnxruntime for
    50 ms. Meanwhile they take processors from another model.
    """
    end = time.perf_counter() + _LONGEST_WAIT_S
    while True:
        start, cpu_start = time.perf_counter(), time.process_time()
        time.sleep(_STEP_S)
        now = time.perf_counter()
        if time.process_time() - cpu_start < 0.2 * (now - start) or now > end:
            return


def disturbance(
    samples: Sequence[Sample], threads: int, *, ratios: ArrayLike = (), processors: int | None = None
) -> str:
    """Say in words what disturbed a measurement; "" on a quiet machine.

    Involuntary context switches do not tell: a busy machine had 50 to 90 per second, a nearly quiet one 35 to 490.
    Nor does the load average, which holds the minute before, in which validation itself worked.

    Args:
        samples: A sample before the measurement, and one after it if it has been made.
        threads: Number of threads that were measured.
        ratios: Candidate / reference of each pair; one row per candidate.
        processors: Number of processors of the machine. None: those of this machine.
    """
    stretch = float(np.mean([sample.spin_s / sample.spin_cpu_s for sample in samples]))
    if stretch > _MOST_STRETCH:
        return f"a fixed piece of work took {stretch:.1f} times its processor time"
    before, after = samples[0], samples[-1]
    processors = processors or os.cpu_count() or 1
    seconds = after.wall_s - before.wall_s
    if seconds > 0 and before.all_cpu_s is not None and after.all_cpu_s is not None:
        own_s = after.own_cpu_s - before.own_cpu_s
        others = max(0.0, after.all_cpu_s - before.all_cpu_s - own_s - _TICKS_S) / seconds
        if others - max(0, processors - threads) > _MOST_MISSING:
            return f"other processes used {others:.1f} of {processors} processors"
    drift = after.spin_cpu_s / before.spin_cpu_s
    if max(drift, 1 / drift) > _MOST_DRIFT:
        word = "slower" if drift > 1 else "faster"
        return f"the processor became {word} by a factor of {max(drift, 1 / drift):.1f}"
    for row in np.atleast_2d(ratios):
        low, median, high = np.quantile(row, [0.25, 0.5, 0.75]) if len(row) else (1.0, 1.0, 1.0)
        if (high - low) / median > _MOST_SPREAD:
            return f"the middle half of the pairs spreads over {(high - low) / median * 100:.0f} % of their median"
    return ""


def _spin(threads: int) -> tuple[float, float]:
    cpu_times: list[float] = []

    def work() -> None:
        start = time.thread_time()
        hashlib.pbkdf2_hmac("sha256", b"the same work", b"at each call: 16", _SPIN_ITERATIONS)
        cpu_times.append(time.thread_time() - start)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seconds = time.perf_counter() - start
    # A counter that the system updates too rarely says nothing.
    return seconds, min(cpu_times) or seconds


def _all_cpu_s() -> float | None:
    try:
        first_line = Path("/proc/stat").read_text("ascii").split("\n", 1)[0]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, interrupts, soft_interrupts, steal = map(int, first_line.split()[1:9])
    return (user + nice + system + interrupts + soft_interrupts + steal) / os.sysconf("SC_CLK_TCK")
