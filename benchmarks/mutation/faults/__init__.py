"""The planted faults, by the part of the artifact that is at fault."""

from benchmarks.mutation.fault import FAULTS, Fault
from benchmarks.mutation.faults import (  # noqa: F401
    bf16,
    int8,
    interface_files,
    manifests,
    onnx_graphs,
    openvino_graphs,
    torchscript_graphs,
    weights,
)

__all__ = ["FAULTS", "Fault"]
