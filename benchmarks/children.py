"""Processes of contestants: each answers requests as lines of JSON, so that all can take turns."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from compileflow.errors import one_line
from compileflow.validation.measure.contention import Sample, take_sample

ROOT = Path(__file__).parents[1]


class ContenderError(Exception):
    """A contender cannot be made, or its process failed."""


class Child:
    """The process of one contender.

    Attributes:
        cpu_s: Processor time of the process until its last answer.
    """

    def __init__(self, words: Sequence[str], threads: int, log_path: Path):
        """Start a command that writes its first answer when it has loaded."""
        self.cpu_s = 0.0
        self._log_path = log_path
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("w") as log:
            self._process = subprocess.Popen(
                words,
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def answer(self) -> dict[str, Any]:
        """Return the next answer.

        Raises:
            ContenderError: The process ended, or it answered with an error.
        """
        line = self._process.stdout.readline()
        if not line:
            raise ContenderError(f"its process ended with {self._process.wait()}: see {self._log_path}")
        values: dict[str, Any] = json.loads(line)
        if "error" in values:
            raise ContenderError(one_line(values["error"])[:300])
        self.cpu_s = values.get("cpu_s", self.cpu_s)
        return values

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request, and return its answer. Raises as `answer` does."""
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.communicate()


def sample(children: Iterable[Child], threads: int) -> Sample:
    """Read the machine's counters; the processor time of the contenders counts as that of this process."""
    counters = take_sample(threads)
    return replace(counters, own_cpu_s=counters.own_cpu_s + sum(child.cpu_s for child in children))


def quartiles(values: Any) -> list[float]:
    """Return the lower quartile, the median and the upper quartile."""
    return [float(value) for value in np.quantile(values, (0.25, 0.5, 0.75))]
