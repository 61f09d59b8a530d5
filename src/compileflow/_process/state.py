"""The state of a process: its memory, and the settings that native toolchains change and blocks restore."""

from __future__ import annotations

import os
import random
import resource
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

_one_at_a_time = threading.RLock()


@contextmanager
def undisturbed_process() -> Iterator[None]:
    """Run a block, then restore the environment, torch's thread count and all random states.

    torch is restored only if it was imported before the block; an import cannot be undone. Blocks of several
    threads wait for each other: otherwise one would restore what another had set for its own time.
    """
    with _one_at_a_time:
        environment = dict(os.environ)
        states = random.getstate(), np.random.get_state()
        torch = sys.modules.get("torch")
        torch_state = (torch.get_num_threads(), torch.random.get_rng_state()) if torch else None
        try:
            with warnings.catch_warnings():
                yield
        finally:
            _restore_environment(environment)
            random.setstate(states[0])
            np.random.set_state(states[1])
            if torch is not None and torch_state is not None:
                torch.set_num_threads(torch_state[0])
                torch.random.set_rng_state(torch_state[1])


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set variables of the environment within a block, then restore or remove them."""
    old_values = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in old_values.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Let torch use `count` threads within the block; None changes nothing."""
    import torch

    old_count = torch.get_num_threads()
    if count is None or count == old_count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(old_count)


def resident_bytes() -> int:
    """Return the resident memory of this process in bytes; 0 if the system does not report it."""
    try:
        fields = Path("/proc/self/statm").read_text("ascii").split()
    except OSError:
        return 0
    return int(fields[1]) * resource.getpagesize()


def _forget_other_threads() -> None:
    """In a forked process: the thread that holds the parent's lock does not exist."""
    global _one_at_a_time
    _one_at_a_time = threading.RLock()


os.register_at_fork(after_in_child=_forget_other_threads)


def _restore_environment(environment: dict[str, str]) -> None:
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    for name, value in environment.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
