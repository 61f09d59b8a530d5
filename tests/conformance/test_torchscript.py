"""torchscript passes the conformance suite for targets."""

from typing import ClassVar

from compileflow.testing.targets import TargetConformance


class TestTorchScript(TargetConformance):
    target_name: ClassVar[str] = "torchscript"
