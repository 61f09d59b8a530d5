"""hyperdex passes the conformance suite for targets, on a double of the vendor's toolchain."""

from typing import ClassVar

import pytest

from compileflow.testing.targets import TargetConformance


@pytest.mark.usefixtures("vendor_doubles")
class TestHyperdex(TargetConformance):
    target_name: ClassVar[str] = "hyperdex"
