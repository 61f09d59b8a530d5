"""The verdict on a compiled model: the four values, and those that may be registered."""

from __future__ import annotations

from typing import Literal, get_args

Outcome = Literal["pass", "warn", "fail", "error"]
AcceptedOutcome = Literal["pass", "warn"]
# From the best to the worst.
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
