"""onnx-runtime keeps the targets' contract."""

from typing import ClassVar

from compileflow.testing.targets import TargetConformance


class TestOnnxRuntime(TargetConformance):
    target_name: ClassVar[str] = "onnx-runtime"
