"""Judge: the suite's gates turn measurements into a verdict. Nothing else in compileflow does."""

from __future__ import annotations

from compileflow.validation.judge.suite import gates_for, load_suite, suite_digest
from compileflow.validation.judge.user_suite import UserSuite, load_user_suite, parse_user_suite
from compileflow.validation.judge.verdict import GateResult, Verdict, judge

__all__ = [
    "GateResult",
    "UserSuite",
    "Verdict",
    "gates_for",
    "judge",
    "load_suite",
    "load_user_suite",
    "parse_user_suite",
    "suite_digest",
]
