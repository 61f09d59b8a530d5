"""The fixture `vendor_doubles`: the vendors' toolchains and devices during a test."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from compileflow.targets._vendor import toolchain as vendor_toolchain

DOUBLES = Path(__file__).parent
_MODULES = ("double_graphs", "hyperdex", "neuroncc", "neuronxcc", "torch_blade", "torch_neuron", "torch_neuronx")


@pytest.fixture
def vendor_doubles(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Put the doubles on sys.path, also for child processes, and return the folder with their device nodes."""
    devices = tmp_path_factory.mktemp("dev")
    for name in ("neuron0", "xfpga0"):
        (devices / name).touch()
    monkeypatch.setattr(vendor_toolchain, "DEVICE_NODES", devices)
    monkeypatch.syspath_prepend(DOUBLES)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(DOUBLES), *filter(None, [os.environ.get("PYTHONPATH")])])
    )
    with warnings.catch_warnings():
        yield devices
    for name in [name for name in sys.modules if name.partition(".")[0] in _MODULES]:
        del sys.modules[name]
    # torch_neuron attaches itself to torch.
    vars(sys.modules.get("torch", pytest)).pop("neuron", None)
