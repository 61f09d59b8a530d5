"""onnx-runtime passes the conformance suite for targets."""

from typing import ClassVar

from compileflow.testing.targets import TargetConformance


class TestOnnxRuntime(TargetConformance):
    target_name: ClassVar[str] = "onnx-runtime"
