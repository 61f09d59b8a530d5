"""A check that a block leaves its process as it found it."""

# ruff: noqa: S101 - it is part of pytest suites, kept in the library so that third parties can inherit them.

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


@contextmanager
def unchanged_process() -> Iterator[None]:
    """Run a block and compare: environment, working folder, warnings filters, torch's threads, random states."""
    before = process_state()
    yield
    after = process_state()
    changed = [name for name, value in before.items() if after[name] != value]
    if "environment" in changed:
        # Names alone: values may be secret.
        was, now = before["environment"].items(), after["environment"].items()
        changed += sorted({name for name, _ in was ^ now})
    assert not changed, f"the process was changed: {', '.join(changed)}"


def process_state() -> dict[str, Any]:
    """Return what belongs to the whole process, in a form that can be compared and read."""
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
