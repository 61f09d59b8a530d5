"""torch-export passes the conformance suite for targets."""

from compileflow.testing.targets import TargetConformance


class TestTorchExport(TargetConformance):
    """The tests that every target must pass."""

    target_name = "torch-export"
