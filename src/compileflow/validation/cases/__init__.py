"""Cases: the calls that both models answer, generated or from natural examples."""

from __future__ import annotations

from compileflow.validation.cases.case import Case
from compileflow.validation.cases.examples import (
    check_signals,
    class_names,
    example_lines,
    generated_count,
    load_examples,
    load_signals,
    note_on_count,
    note_on_fields,
    sample_examples,
    signals_digest,
)
from compileflow.validation.cases.generated_signals import NamedSignal, generated_signals
from compileflow.validation.cases.labels import (
    CLASS_FOLDERS,
    LABELS_UNUSED,
    METRICS_OF_LABELS,
    MULTI_LABEL,
    ONE_LABEL,
    check_labels,
    has_label,
    truth_of,
)
from compileflow.validation.cases.signals import SignalCases
from compileflow.validation.cases.text import ODD_TEXTS, CaseBuilder, agreement_cases, shape_cases

__all__ = [
    "CLASS_FOLDERS",
    "LABELS_UNUSED",
    "METRICS_OF_LABELS",
    "MULTI_LABEL",
    "ODD_TEXTS",
    "ONE_LABEL",
    "Case",
    "CaseBuilder",
    "NamedSignal",
    "SignalCases",
    "agreement_cases",
    "check_labels",
    "check_signals",
    "class_names",
    "example_lines",
    "generated_count",
    "generated_signals",
    "has_label",
    "load_examples",
    "load_signals",
    "note_on_count",
    "note_on_fields",
    "sample_examples",
    "shape_cases",
    "signals_digest",
    "truth_of",
]
