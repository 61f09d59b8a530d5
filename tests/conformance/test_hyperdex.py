"""hyperdex keeps the targets' contract, on a double of its vendor's toolchain."""

from functools import partial
from typing import ClassVar

import pytest

from compileflow.spec import CompileSpec, Precision
from compileflow.testing import targets
from compileflow.testing.targets import TargetConformance


@pytest.fixture
def fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite asks for fp32, which an LPU has not; a double computes in fp32 whatever it is asked for."""
    monkeypatch.setattr(targets, "CompileSpec", partial(CompileSpec, precision=Precision.FP16))


@pytest.mark.usefixtures("vendor_doubles", "fp16")
class TestHyperdex(TargetConformance):
    target_name: ClassVar[str] = "hyperdex"
