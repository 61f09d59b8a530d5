"""Double of neuron-cc: only the flags of its CLI reference."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from double_graphs import CompilerArguments

CASTS = ("all", "matmult", "matmult-fp16", "matmult-bf16", "all-fp16")
FAST_MATH = ("all", "none", "fast-relayout", "no-fast-relayout", *(f"fp32-cast-{cast}" for cast in CASTS))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the flags' values, or raise as the compiler does."""
    parser = CompilerArguments(prog="neuron-cc", allow_abbrev=False, add_help=False)
    parser.add_argument("--verbose", choices=("DEBUG", "INFO", "WARN", "ERROR"))
    parser.add_argument("--neuroncore-pipeline-cores", type=int)
    parser.add_argument("--enable-saturate-infinity", action="store_true")
    parser.add_argument("--enable-fast-loading-neuron-binaries", action="store_true")
    parser.add_argument("--enable-fast-context-switch", action="store_true")
    parser.add_argument("--fast-math", nargs="+", choices=FAST_MATH, default=["all"])
    parser.add_argument("--fp32-cast", choices=CASTS)
    values = parser.parse_args(list(arguments))
    if {"all", "none"} <= set(values.fast_math):
        parser.error("argument --fast-math: all and none are mutually exclusive")
    return values
