"""aot-inductor keeps the targets' contract."""

from typing import ClassVar

from compileflow.testing.targets import TargetConformance


class TestAotInductor(TargetConformance):
    target_name: ClassVar[str] = "aot-inductor"
