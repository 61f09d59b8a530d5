"""Cases: the calls that both models answer."""

from __future__ import annotations

from compileflow.validation.cases.signals import (
    NamedSignal,
    SignalCases,
    generated_signals,
    load_signals,
    signals_digest,
)
from compileflow.validation.cases.text import (
    ODD_TEXTS,
    Case,
    CaseBuilder,
    agreement_cases,
    load_examples,
    shape_cases,
)

__all__ = [
    "ODD_TEXTS",
    "Case",
    "CaseBuilder",
    "NamedSignal",
    "SignalCases",
    "agreement_cases",
    "generated_signals",
    "load_examples",
    "load_signals",
    "shape_cases",
    "signals_digest",
]
