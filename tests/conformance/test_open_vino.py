"""openvino passes the conformance suite for targets."""

from typing import ClassVar

from compileflow.testing.targets import TargetConformance


class TestOpenVino(TargetConformance):
    target_name: ClassVar[str] = "openvino"
