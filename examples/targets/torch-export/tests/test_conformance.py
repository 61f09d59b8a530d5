"""torch-export keeps the targets' contract."""

from compileflow.testing.targets import TargetConformance


class TestTorchExport(TargetConformance):
    """Everything that every target must do."""

    target_name = "torch-export"
