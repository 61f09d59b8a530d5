"""A check that a block restores the state of its process: environment, threads, random states."""

# ruff: noqa: S101 - pytest suites use it, and third parties inherit them, so it belongs to the library.

from __future__ import annotations

import os
import random
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

# Prefect starts this thread with the first flow of a process. Every few seconds it draws from the module `random`,
# whose state all threads share.
_PREFECT_THREAD = "GlobalEventLoopThread"


@contextmanager
def unchanged_process() -> Iterator[None]:
    """Fail if the block changes environment, working folder, warning filters, threads or a random state.

    The state of the module `random` is not compared while a thread of Prefect may change it.
    """
    before = process_state()
    yield
    after = process_state()
    if any(thread.name == _PREFECT_THREAD for thread in threading.enumerate()):
        del before["random"]
    changes = [name for name, value in before.items() if after[name] != value]
    if "environment" in changes:
        # The message shows only the names, because a value may be secret.
        difference = before["environment"].items() ^ after["environment"].items()
        changes += sorted({name for name, _ in difference})
    assert not changes, f"the process was changed: {', '.join(changes)}"


def process_state() -> dict[str, Any]:
    """Return the state of the whole process, in a form that can be compared and printed."""
    import torch

    numpy_state: Any = np.random.get_state(legacy=False)
    return {
        "environment": dict(os.environ),
        "working folder": os.getcwd(),
        "warnings filters": list(warnings.filters),
        "torch threads": torch.get_num_threads(),
        "torch random": torch.random.get_rng_state().tolist(),
        "numpy random": (numpy_state["state"]["pos"], numpy_state["state"]["key"].tolist()),
        "random": random.getstate(),
    }
