"""Outcomes of a validation: the four values, and the two that may be registered."""

from __future__ import annotations

from typing import Literal, get_args

Outcome = Literal["pass", "warn", "fail", "error"]
AcceptedOutcome = Literal["pass", "warn"]
# From the best to the worst.
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
ACCEPTED_OUTCOMES: tuple[Outcome, ...] = get_args(AcceptedOutcome)
