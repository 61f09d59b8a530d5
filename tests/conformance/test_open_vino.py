"""openvino keeps the targets' contract."""

from typing import ClassVar

from compileflow.testing.targets import TargetConformance


class TestOpenVino(TargetConformance):
    target_name: ClassVar[str] = "openvino"
