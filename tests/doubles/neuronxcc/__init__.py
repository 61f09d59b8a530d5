"""Double of neuronx-cc: only the flags of its CLI reference."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from double_graphs import CompilerArguments


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the flags' values, or raise as the compiler does."""
    parser = CompilerArguments(prog="neuronx-cc", allow_abbrev=False, add_help=False)
    parser.add_argument("--target", required=True, choices=("inf2", "trn1", "trn1n", "trn2"))
    parser.add_argument("--model-type", choices=("generic", "transformer", "unet-inference"), default="generic")
    parser.add_argument("--auto-cast", choices=("none", "matmult", "all"), default="matmult")
    parser.add_argument("--auto-cast-type", choices=("bf16", "fp16", "tf32", "fp8_e4m3"), default="bf16")
    parser.add_argument("--distribution-strategy", choices=("llm-training",))
    parser.add_argument("--logical-nc-config", "-lnc", type=int, choices=(1, 2))
    parser.add_argument("--optlevel", "-O", type=int, choices=(1, 2, 3), default=2)
    parser.add_argument("--enable-mixed-precision-accumulation", action="store_true")
    parser.add_argument("--enable-saturate-infinity", action="store_true")
    parser.add_argument("--enable-fast-context-switch", action="store_true")
    parser.add_argument("--enable-fast-loading-neuron-binaries", action="store_true")
    parser.add_argument("--logfile", default="log-neuron-cc.txt")
    parser.add_argument("--verbose", choices=("info", "warning", "error", "critical", "debug"))
    return parser.parse_args(list(arguments))
