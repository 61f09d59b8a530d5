"""Outcomes of a validation: the five values, the two that may be registered; the mark of unusable latencies."""

from __future__ import annotations

from typing import Literal, get_args

# pending-device: the artifact was not run, because the machine lacks the target's device.
Outcome = Literal["pass", "warn", "fail", "error", "pending-device"]
PENDING: Outcome = "pending-device"
AcceptedOutcome = Literal["pass", "warn"]
# From the best to the worst; pending-device is a verdict on no component.
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
ACCEPTED_OUTCOMES: tuple[Outcome, ...] = get_args(AcceptedOutcome)

# Figure that takes the place of all latencies if other processes disturbed their measurement.
LATENCY_ON_BUSY_MACHINE = "latency_on_busy_machine"
