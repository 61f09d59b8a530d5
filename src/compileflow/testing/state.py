"""A check that a block restores the state of its process: environment, threads, random states."""

# ruff: noqa: S101 - pytest suites use it, and third parties inherit them, so it belongs to the library.

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


@contextmanager
def unchanged_process(*, other_threads_draw: bool = False) -> Iterator[None]:
    """Fail if the block changes environment, working folder, warning filters, threads or a random state.

    Args:
        other_threads_draw: True leaves out the state of the `random` module, which all threads share: those of
            Prefect draw their delays from it at any time.
    """
    before = process_state()
    yield
    after = process_state()
    if other_threads_draw:
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
