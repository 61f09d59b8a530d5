"""Verdict: Great Expectations judges the measurements by the suite's gates."""

from __future__ import annotations

import html
import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from compileflow.contracts import ACCEPTED_OUTCOMES, Outcome
from compileflow.errors import MeasurementError
from compileflow.spec import GRAPH_TASKS, HfTask, Precision
from compileflow.validation.judge.calibration import Calibration, cause, opened
from compileflow.validation.judge.rates import (
    FALSE_REFUSALS,
    chance_of_fewer,
    holm_levels,
    mcnemar_p,
    rate_bounds,
    smallest_loss,
)
from compileflow.validation.judge.suite import EXPECTATION_TYPES, Gate, gates_for, load_suite
from compileflow.validation.judge.user_suite import UserSuite
from compileflow.validation.measure.measurements import Measurements


class RateEvidence(BaseModel):
    """Statistics of a rate.

    Attributes:
        hits: Decisions that agree; ties of the source model agree with any decision.
        trials: All decisions.
        ties: Decisions on which the source model is undecided.
        is_labelled: Whether the right decision of an example is known. Otherwise the source model is right.
        right_to_wrong: Decisions that changed from right to wrong.
        wrong_to_right: Decisions that changed from wrong to right.
        p_value: Exact two-sided p value of McNemar's test.
        lower: Lower bound of the rate, with 95 % confidence.
        upper: Upper bound of the rate, with 95 % confidence.
        smallest_loss: Smallest share of changed decisions that these trials show with 95 % probability.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    hits: int
    trials: int
    ties: int
    is_labelled: bool
    right_to_wrong: int
    wrong_to_right: int
    p_value: float
    lower: float
    upper: float
    smallest_loss: float


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
        detail: Counts and bounds of a rate, the reason why the limit moved or why the gate could not be judged.
        floor: Noise of the source model in the same units, or what rounding it to the precision does to it.
        multiple: The measured value as a multiple of the floor; of a rate, the share of misses.
        evidence: Statistics of a rate.
        suite: Name of the user's suite that has the gate; "" for compileflow's own.
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
    floor: float | None = None
    multiple: float | None = None
    evidence: RateEvidence | None = None
    suite: str = ""


class Verdict(BaseModel):
    """Outcome, reason in one line, and every gate in the suite's order; those of a user's suite come last."""

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
    strict: bool = False,
    user_suite: UserSuite | None = None,
    on_result: Callable[[str, Any], None] | None = None,
) -> Verdict:
    """Judge measurements by the suite's gates for a precision and a task.

    A gate that cannot be evaluated is an `error`, and an error never passes. A gate whose metric is unusable, a
    latency of a busy machine, is not judged; the reason of a verdict that allows registration says so.

    Args:
        measurements: Everything that was measured.
        precision: Precision of the compiled model.
        hf_task: Task of the compiled model.
        overrides: Value of each limit that the target or the user sets.
        strict: Allow a tenth of the changed decisions, however many rounding alone changes.
        user_suite: Suite of the user. Its gates are judged as well, and change nothing about the other gates.
        on_result: Gets each result of Great Expectations, with the name of the suite and of the table.

    Raises:
        MeasurementError: The suite has no gate for the task, or a gate of it was not judged.
    """
    notes = list(measurements.notes)
    measured = {*measurements.scalars, *(row["metric"] for row in measurements.rates)}
    gates, calibrations, usual_limits, unjudged = [], {}, {}, []
    users_gates = user_suite.gates_for(precision, hf_task) if user_suite is not None else []
    for gate in (*gates_for(precision, hf_task, overrides or {}, strict=strict), *users_gates):
        if hf_task.graph_task in gate.entry.optional and gate.entry.metric not in measured:
            # A gate that is optional for every task needs no note, nor does a decision that few models make.
            if gate.entry.table == "scalars" and set(gate.entry.optional) != set(GRAPH_TASKS):
                notes.append(f"{gate.entry.gate} does not apply to this model.")
            continue
        if gate.entry.metric in measurements.unusable:
            unjudged.append(f"{gate.entry.gate} not judged: {measurements.unusable[gate.entry.metric]}")
            continue
        is_set = gate.entry.limit in (overrides or {})
        is_set |= strict and gate.entry.table == "rates"
        calibration = Calibration() if gate.suite else opened(gate, measurements, precision, is_fixed=is_set)
        calibrations[gate.entry.gate], usual_limits[gate.entry.gate] = calibration, gate.limit
        gates.append(gate if calibration.limit is None else replace(gate, limit=calibration.limit))
    tables = _tables(measurements, gates, calibrations)
    examples = Counter(str(row["metric"]) for row in measurements.rates)
    results: list[GateResult] = []
    # Holm's correction over the gates of both suites would loosen compileflow's own.
    for suite_gates in ([gate for gate in gates if not gate.suite], [gate for gate in gates if gate.suite]):
        levels = _levels(measurements, suite_gates)
        for name in ("comparisons", "rates", "scalars"):
            table_gates = [gate for gate in suite_gates if gate.entry.table == name]
            if table_gates:
                title = f"{table_gates[0].suite or load_suite().name}, {name}"
                save = partial(on_result, title) if on_result is not None else None
                results.extend(_judge_table(tables[name], table_gates, examples, levels, save))
    order = {gate.entry.gate: position for position, gate in enumerate(gates)}
    results.sort(key=lambda result: order[result.gate])
    if len(results) != len(gates):
        raise MeasurementError(
            f"Expected results of {len(gates)} gates, got {len(results)}.", hint="Correct the suite file."
        )
    by_name = {gate.entry.gate: gate for gate in gates}
    results = [
        _explained(result, by_name[result.gate], calibrations[result.gate], measurements, precision)
        for result in results
    ]
    outcome, reason = _sum_up(_by_reason(results, by_name, tables["comparisons"]))
    eased = [result.gate for result in results if _is_eased(result, usual_limits[result.gate])]
    if outcome == "pass" and eased:
        mover = "noise" if precision is Precision.FP32 else "rounding"
        reason += (
            f"; {', '.join(eased)} only because {mover} moved {'its limit' if len(eased) == 1 else 'their limits'}"
        )
    if outcome in ACCEPTED_OUTCOMES:
        reason = "; ".join((reason, *unjudged))
    notes += unjudged
    return Verdict(outcome=outcome, reason=reason, gates=tuple(results), notes=tuple(dict.fromkeys(notes)))


def _tables(
    measurements: Measurements, gates: Sequence[Gate], calibrations: Mapping[str, Calibration]
) -> dict[str, Any]:
    import pandas as pd

    agreements = [
        {"metric": row["metric"], "agrees": agreement}
        for row in measurements.rates
        for agreement in [1] * row["hits"] + [0] * (row["trials"] - row["hits"])
    ]
    scalars = [{"metric": name, "value": value} for name, value in measurements.scalars.items()]
    comparisons = pd.DataFrame(measurements.comparisons)
    for gate in gates:
        openings = calibrations[gate.entry.gate].openings
        if gate.entry.table == "comparisons" and openings:
            # The limit of a noisy output is larger. Great Expectations knows one limit for all outputs.
            shares = comparisons["output"].map(openings).fillna(1.0)
            comparisons[_opened_column(gate)] = comparisons[gate.entry.column] / shares
    return {
        "comparisons": comparisons,
        "rates": pd.DataFrame(agreements, columns=["metric", "agrees"]),
        "scalars": pd.DataFrame(scalars, columns=["metric", "value"]),
    }


def _levels(measurements: Measurements, gates: Sequence[Gate]) -> dict[str, float]:
    """Return the level at which each rate gate is tested, by Holm's correction over all that one miss can pass."""
    p_values = {}
    for gate in gates:
        rows = [row for row in measurements.rates if row["metric"] == gate.entry.metric]
        if gate.entry.table == "rates" and rows and gate.limit < 1.0:
            hits, trials = (sum(row[name] for row in rows) for name in ("hits", "trials"))
            p_values[gate.entry.gate] = chance_of_fewer(hits, trials, max(gate.limit, 0.0))
    return holm_levels(p_values)


def _judge_table(
    table: Any,
    gates: Sequence[Gate],
    examples: Mapping[str, int],
    levels: Mapping[str, float],
    on_result: Callable[[Any], None] | None,
) -> list[GateResult]:
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
            suite.add_expectation(_expectation(gate, table.columns, levels))
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
    if on_result is not None:
        on_result(answer)
    gates_by_name = {gate.entry.gate: gate for gate in gates}
    results = []
    for result in answer.results:
        gate = gates_by_name[result.expectation_config.meta["gate"]]
        results.append(_gate_result(gate, result, examples.get(gate.entry.metric or "", 0)))
    return results


def _opened_column(gate: Gate) -> str:
    return f"{gate.entry.column} for {gate.entry.gate}"


def _expectation(gate: Gate, columns: Collection[str], levels: Mapping[str, float]) -> Any:
    from great_expectations.expectations.expectation_configuration import ExpectationConfiguration

    # Registers them.
    import compileflow.validation.judge.expectations  # noqa: F401

    if gate.entry.type not in EXPECTATION_TYPES:
        raise MeasurementError(
            f"The gate {gate.entry.gate} has the unknown type {gate.entry.type!r}.",
            hint=f"Choose one of: {', '.join(EXPECTATION_TYPES)}.",
        )
    column = _opened_column(gate) if _opened_column(gate) in columns else gate.entry.column
    kwargs: dict[str, Any] = {"column": column, "limit": gate.limit}
    if gate.entry.table == "rates":
        kwargs["level"] = levels.get(gate.entry.gate, FALSE_REFUSALS)
    rows = {"metric": gate.entry.metric, "output": gate.entry.output}
    conditions = [f'{name}=="{value}"' for name, value in rows.items() if value is not None]
    if conditions:
        kwargs |= {"row_condition": conditions[0], "condition_parser": "pandas"}
    return ExpectationConfiguration(
        type=gate.entry.type,
        kwargs=kwargs,
        severity=gate.severity,
        # Great Expectations keeps one of two expectations that differ in meta alone.
        description=html.escape(_meaning(gate)).replace("$", "&#36;"),
        meta={"gate": gate.entry.gate},
    ).to_domain_obj()


def _meaning(gate: Gate) -> str:
    side = "at most" if gate.entry.is_maximum else "at least"
    return f"{gate.entry.gate}: {gate.entry.says}; the limit is {side} {gate.limit:.4g}"


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
        outcome = gate.entry.missed if gate.severity == "critical" else "warn"
        detail = _rate_detail(details) or ("not a number" if number is None else "")
    at_most = gate.entry.is_maximum
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
        suite=gate.suite,
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


def _explained(
    result: GateResult, gate: Gate, calibration: Calibration, measurements: Measurements, precision: Precision
) -> GateResult:
    """Add the floor, the limit that it moved, and the statistics of a rate."""
    update: dict[str, Any] = {}
    notes = [*filter(None, (result.detail, measurements.details.get(gate.entry.source)))]
    if calibration.openings and result.measured is not None:
        output, measured = _worst_output(measurements, gate, calibration)
        share = calibration.openings.get(output, 1.0)
        update = {"measured": measured, "limit": result.limit * share}
        if share > 1.0:
            notes.append(
                f"limit raised from {result.limit:.3g}: "
                f"{cause(precision, f'{calibration.floors[output]:.2g}', output)}"
            )
        floor = calibration.floors.get(output)
    else:
        floor = calibration.floor
    if calibration.reason:
        notes.append(calibration.reason)
    value = update.get("measured", result.measured)
    if floor and value is not None:
        distance = value if gate.entry.is_maximum else 1.0 - value
        update |= {"floor": floor, "multiple": distance / floor}
    evidence = _evidence(measurements, gate)
    if evidence is not None and result.outcome != "error":
        update["evidence"] = evidence
        if evidence.ties:
            notes.append(f"{evidence.ties} ties of the source model count as equal")
        if evidence.hits < evidence.trials:
            changes = f"{evidence.trials - evidence.hits} changed"
            if evidence.is_labelled:
                changes += (
                    f", {evidence.right_to_wrong} for the worse and {evidence.wrong_to_right} for the better"
                )
            notes.append(f"{changes}; exact McNemar p = {evidence.p_value:.2g}")
        notes.append(f"a loss of {evidence.smallest_loss * 100:.2g} % would have shown")
    return result.model_copy(update=update | {"detail": "; ".join(notes)})


def _worst_output(measurements: Measurements, gate: Gate, calibration: Calibration) -> tuple[str, float]:
    """Return the output that uses most of its limit, and its largest value."""
    worst = max(
        measurements.comparisons,
        key=lambda row: row[gate.entry.column] / calibration.openings.get(row["output"], 1.0),
    )
    return worst["output"], float(worst[gate.entry.column])


def _evidence(measurements: Measurements, gate: Gate) -> RateEvidence | None:
    rows = [row for row in measurements.rates if row["metric"] == gate.entry.metric]
    if gate.entry.table != "rates" or not rows:
        return None
    hits, trials, ties, gained = (
        sum(row.get(name, 0) for row in rows) for name in ("hits", "trials", "ties", "wrong_to_right")
    )
    lost = sum(row.get("right_to_wrong", row["trials"] - row["hits"]) for row in rows)
    lower, upper = rate_bounds(hits, trials)
    return RateEvidence(
        hits=hits,
        trials=trials,
        ties=ties,
        is_labelled=any("right_to_wrong" in row for row in rows),
        right_to_wrong=lost,
        wrong_to_right=gained,
        p_value=mcnemar_p(lost, gained),
        lower=lower,
        upper=upper,
        smallest_loss=smallest_loss(trials),
    )


def _by_reason(results: Sequence[GateResult], gates: Mapping[str, Gate], comparisons: Any) -> list[GateResult]:
    """Sort results so that the first one that blocks is the right reason.

    That is the suite's order, with one exception: a comparison that holds for rows without padding and token types
    comes after the probes, which say what is wrong with the other rows.
    """
    late = [result for result in results if _holds_for_plain_rows(gates[result.gate], comparisons)]
    probes = [position for position, result in enumerate(results) if gates[result.gate].entry.probe]
    if not probes or not late:
        return list(results)
    last = probes[-1] + 1
    moved = [result for result in results[:last] if result in late]
    return [*(result for result in results[:last] if result not in moved), *moved, *results[last:]]


def _holds_for_plain_rows(gate: Gate, comparisons: Any) -> bool:
    # NaN and missing answers come first wherever they are.
    if gate.entry.table != "comparisons" or gate.entry.noise is None or "plain" not in comparisons:
        return False
    column = _opened_column(gate) if _opened_column(gate) in comparisons else gate.entry.column
    values = comparisons.loc[comparisons["plain"] == 1, column]
    return bool((values <= gate.limit).all()) and not values.empty


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
    suites = Counter(result.suite for result in results if result.suite)
    of_users = "".join(f", {count} of them of the suite {name}" for name, count in suites.items())
    return "pass", f"pass: all {len(results)} gates hold{of_users}"


def _is_eased(result: GateResult, usual_limit: float) -> bool:
    """Return whether a critical gate would not hold at its limit for a model that rounding does not change."""
    if result.severity == "warning" or result.measured is None or result.limit == usual_limit:
        return False
    is_beyond = result.measured > usual_limit if result.comparison == "at most" else result.measured < usual_limit
    return result.outcome == "pass" and is_beyond


def _in_words(result: GateResult) -> str:
    value = "no number" if result.measured is None else f"{result.measured:.4g}"
    suite = f" of the suite {result.suite}" if result.suite else ""
    text = f"{result.gate}{suite} measured {value}, the limit is {result.comparison} {result.limit:.4g}"
    return f"{text}; {result.detail}" if result.detail else text
