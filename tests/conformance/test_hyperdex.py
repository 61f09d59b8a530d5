"""hyperdex keeps the targets' contract, on a double of its vendor's toolchain."""

from typing import ClassVar

import pytest

from compileflow.testing.targets import TargetConformance


@pytest.mark.usefixtures("vendor_doubles")
class TestHyperdex(TargetConformance):
    target_name: ClassVar[str] = "hyperdex"
