"""Verdict: Great Expectations judges the measurements by the suite's gates."""

from __future__ import annotations

import logging
import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from compileflow.contracts import Outcome
from compileflow.errors import MeasurementError
from compileflow.spec import GRAPH_TASKS, HfTask, Precision
from compileflow.validation.judge.suite import Gate, gates_for
from compileflow.validation.measure.measurements import Measurements


class GateResult(BaseModel):
    """The result of one gate.

    Attributes:
        gate: Name of the gate.
        says: Meaning of the gate, from the suite file.
        outcome: Outcome of the gate.
        severity: critical or warning.
        comparison: Side of the limit that passes.
        measured: Worst value, or rate; None if it is not a number.
        limit: Limit of the gate.
        margin: Remaining share of the distance to the limit: 1 is all of it, 0 is at the limit, negative is
            beyond; None if the limit (0 or 1) leaves no room by design.
        detail: Counts and bounds of a rate, or the reason why the gate could not be judged.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    gate: str
    says: str
    outcome: Outcome
    severity: str
    comparison: Literal["at most", "at least"]
    measured: float | None
    limit: float
    margin: float | None
    detail: str


class Verdict(BaseModel):
    """Outcome, reason in one line, and every gate in the suite's order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    outcome: Outcome
    reason: str
    gates: tuple[GateResult, ...]
    notes: tuple[str, ...] = ()


def judge(
    measurements: Measurements,
    *,
    precision: Precision,
    hf_task: HfTask,
    overrides: Mapping[str, float] | None = None,
) -> Verdict:
    """Judge measurements by the suite's gates for a precision and a task.

    A gate that cannot be evaluated is an `error`, and an error never passes.

    Args:
        measurements: Everything that was measured.
        precision: Precision of the compiled model.
        hf_task: Task of the compiled model.
        overrides: Value of each limit that the target or the user sets.

    Raises:
        MeasurementError: The suite has no gate for the task, or a gate of it was not judged.
    """
    notes = list(measurements.notes)
    measured = {*measurements.scalars, *(row["metric"] for row in measurements.rates)}
    gates = []
    for gate in gates_for(precision, hf_task, overrides or {}):
        if hf_task.graph_task in gate.entry.optional and gate.entry.metric not in measured:
            # A gate that is optional for every task needs no note, nor does a decision that few models make.
            if gate.entry.table == "scalars" and set(gate.entry.optional) != set(GRAPH_TASKS):
                notes.append(f"{gate.entry.gate} does not apply to this model.")
        else:
            gates.append(gate)
    tables = _tables(measurements)
    examples = Counter(str(row["metric"]) for row in measurements.rates)
    results: list[GateResult] = []
    for name in ("comparisons", "rates", "scalars"):
        table_gates = [gate for gate in gates if gate.entry.table == name]
        if table_gates:
            results.extend(_judge_table(tables[name], table_gates, examples))
    order = {gate.entry.gate: position for position, gate in enumerate(gates)}
    results.sort(key=lambda result: order[result.gate])
    if len(results) != len(gates):
        raise MeasurementError(
            f"Expected results of {len(gates)} gates, got {len(results)}.", hint="Correct the suite file."
        )
    outcome, reason = _sum_up(results)
    return Verdict(outcome=outcome, reason=reason, gates=tuple(results), notes=tuple(dict.fromkeys(notes)))


def _tables(measurements: Measurements) -> dict[str, Any]:
    import pandas as pd

    agreements = [
        {"metric": row["metric"], "agrees": agreement}
        for row in measurements.rates
        for agreement in [1] * row["hits"] + [0] * (row["trials"] - row["hits"])
    ]
    scalars = [{"metric": name, "value": value} for name, value in measurements.scalars.items()]
    return {
        "comparisons": pd.DataFrame(measurements.comparisons),
        "rates": pd.DataFrame(agreements, columns=["metric", "agrees"]),
        "scalars": pd.DataFrame(scalars, columns=["metric", "value"]),
    }


def _judge_table(table: Any, gates: Sequence[Gate], examples: Mapping[str, int]) -> list[GateResult]:
    """Run one checkpoint over one table."""
    with warnings.catch_warnings():
        # These come from great_expectations' use of its dependencies; no code of compileflow runs in this block.
        warnings.simplefilter("ignore")
        import great_expectations as gx

        logging.getLogger("great_expectations").setLevel(logging.ERROR)
        context = gx.get_context(mode="ephemeral")
        context.variables.progress_bars = {"globally": False}
        asset = context.data_sources.add_pandas("measurements").add_dataframe_asset("table")
        suite = context.suites.add(gx.ExpectationSuite(name="regression"))
        for gate in gates:
            suite.add_expectation(_expectation(gate))
        if len(suite.expectations) != len(gates):
            raise MeasurementError(
                f"Expected {len(gates)} gates, Great Expectations accepted {len(suite.expectations)}.",
                hint="Correct the suite file.",
            )
        definition = context.validation_definitions.add(
            gx.ValidationDefinition(
                name="regression", data=asset.add_batch_definition_whole_dataframe("all"), suite=suite
            )
        )
        answer = definition.run(batch_parameters={"dataframe": table})
    gates_by_name = {gate.entry.gate: gate for gate in gates}
    results = []
    for result in answer.results:
        gate = gates_by_name[result.expectation_config.meta["gate"]]
        results.append(_gate_result(gate, result, examples.get(gate.entry.metric or "", 0)))
    return results


def _expectation(gate: Gate) -> Any:
    from great_expectations.expectations.expectation_configuration import ExpectationConfiguration

    from compileflow.validation.judge.expectations import EXPECTATIONS

    types = {expectation.expectation_type for expectation in EXPECTATIONS}
    if gate.entry.type not in types:
        raise MeasurementError(
            f"The gate {gate.entry.gate} has the unknown type {gate.entry.type!r}.",
            hint=f"Choose one of: {', '.join(sorted(types))}.",
        )
    kwargs: dict[str, Any] = {"column": gate.entry.column, "limit": gate.limit}
    if gate.entry.metric is not None:
        kwargs |= {
            "row_condition": f'metric=="{gate.entry.metric}"',
            "condition_parser": "pandas",
        }
    return ExpectationConfiguration(
        type=gate.entry.type,
        kwargs=kwargs,
        severity=gate.severity,
        meta={"gate": gate.entry.gate},
    ).to_domain_obj()


def _gate_result(gate: Gate, result: Any, examples: int) -> GateResult:
    exceptions = _exceptions(result)
    details = (result.result or {}).get("details") or {}
    value = (result.result or {}).get("observed_value")
    number = float(value) if value is not None and math.isfinite(value) else None
    outcome: Outcome
    if exceptions:
        outcome, detail = "error", exceptions
    elif result.success:
        outcome, detail = "pass", _rate_detail(details)
    elif details.get("decision") == "inconclusive":
        # One example may give many trials, such as its tokens or its neighbours.
        missing_examples = (
            None if details["more"] is None else math.ceil(details["more"] * examples / details["trials"])
        )
        outcome = "warn"
        detail = _rate_detail(details) + (
            f"; inconclusive: {missing_examples} more examples at this rate would decide"
            if missing_examples is not None
            else "; inconclusive, and the rate is the limit itself"
        )
    else:
        outcome = "fail" if gate.severity == "critical" else "warn"
        detail = _rate_detail(details) or ("not a number" if number is None else "")
    at_most = gate.entry.type.endswith("at_most")
    return GateResult(
        gate=gate.entry.gate,
        says=gate.entry.says,
        outcome=outcome,
        severity=gate.severity,
        comparison="at most" if at_most else "at least",
        measured=number,
        limit=gate.limit,
        margin=_margin(number, gate.limit, at_most),
        detail=detail,
    )


def _margin(value: float | None, limit: float, at_most: bool) -> float | None:
    if value is None or limit == (0.0 if at_most else 1.0):
        return None
    return (limit - value) / limit if at_most else (value - limit) / (1.0 - limit)


def _rate_detail(details: Mapping[str, Any]) -> str:
    if "trials" not in details:
        return ""
    return (
        f"{details['hits']} of {details['trials']}, one-sided 95 % bounds {details['lower']:.4f} and "
        f"{details['upper']:.4f}"
    )


def _exceptions(result: Any) -> str:
    """Return the messages of the exceptions; they are flat, or one level deeper if a metric raised."""
    info = result.exception_info or {}
    nested = [value for value in info.values() if isinstance(value, dict)]
    entries = [info] if "raised_exception" in info else nested
    messages = {str(entry.get("exception_message")) for entry in entries if entry.get("raised_exception")}
    return "; ".join(sorted(messages))


def _sum_up(results: Sequence[GateResult]) -> tuple[Outcome, str]:
    """Name the verdict by the first gate that blocks: without answers, the later gates have no rows to judge."""
    for outcomes in (("fail", "error"), ("warn",)):
        blocking = [result for result in results if result.outcome in outcomes]
        if blocking:
            suffix = f" (and {len(blocking) - 1} more)" if len(blocking) > 1 else ""
            return blocking[0].outcome, f"{blocking[0].outcome}: {_in_words(blocking[0])}{suffix}"
    return "pass", f"pass: all {len(results)} gates hold"


def _in_words(result: GateResult) -> str:
    value = "no number" if result.measured is None else f"{result.measured:.4g}"
    text = f"{result.gate} measured {value}, the limit is {result.comparison} {result.limit:.4g}"
    return f"{text}; {result.detail}" if result.detail else text
