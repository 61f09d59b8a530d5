"""The instruction sets of this machine's CPU, read from the system without heavy imports."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

from compileflow.spec import Precision

CPUINFO = Path("/proc/cpuinfo")
# Instruction sets that compilers and kernels choose by, under the names of the Linux kernel.
_SIMD = (
    "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx_vnni",
    "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_fp16", "amx_int8",
    "asimd", "asimddp", "asimdhp", "bf16", "i8mm", "sve", "sve2",
)  # fmt: skip
# One of these instruction sets is enough. fp32 and int8 run on every CPU, int8 only slower on some.
_NEEDS: Mapping[Precision, tuple[str, ...]] = {
    Precision.BF16: ("avx512_bf16", "amx_bf16", "bf16"),
    Precision.FP16: ("avx512_fp16", "amx_fp16", "asimdhp"),
}


def cpu_features() -> tuple[str, ...]:
    """Return the SIMD instruction sets of this CPU, sorted; () if the system does not list them."""
    return _features(str(CPUINFO))


def lacking_precisions(precisions: Iterable[Precision]) -> dict[Precision, str]:
    """Return the precisions that this CPU does not support, each with the missing instruction sets."""
    features = set(cpu_features())
    return {
        precision: f"this CPU has no {precision.value} instructions ({', '.join(_NEEDS[precision])})"
        for precision in precisions
        if precision in _NEEDS and not features.intersection(_NEEDS[precision])
    }


def missing_features(compiled_for: Iterable[str]) -> tuple[str, ...]:
    """Return the instruction sets that a compiled model needs and this CPU lacks."""
    return tuple(sorted(set(compiled_for) - set(cpu_features())))


@cache
def _features(cpuinfo: str) -> tuple[str, ...]:
    try:
        lines = Path(cpuinfo).read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return tuple(sorted((set(value.split()) & set(_SIMD)) | {platform.machine()}))
    return (platform.machine(),)
