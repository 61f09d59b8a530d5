"""Expectations that regression needs on top of Great Expectations: none skips a NaN or passes on zero rows.

Importing this module registers them. It imports great_expectations, which takes seconds, so only `judge` does it.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from great_expectations.execution_engine import PandasExecutionEngine
from great_expectations.expectations.expectation import ColumnAggregateExpectation
from great_expectations.expectations.metrics import ColumnAggregateMetricProvider, column_aggregate_value

from compileflow.validation.judge.rates import chance_of_fewer, rate_bounds, trials_to_decide


class _Extremes(ColumnAggregateMetricProvider):  # type: ignore[misc]
    """Smallest and largest value of a column; NaN if any value is NaN or missing."""

    metric_name = "column.strict_extremes"

    @column_aggregate_value(engine=PandasExecutionEngine, filter_column_isnull=False)  # type: ignore[untyped-decorator]
    def _pandas(cls, column: Any, **_: Any) -> dict[str, float]:  # noqa: N805 - Great Expectations turns it into a classmethod
        values = column.to_numpy(dtype=float, na_value=np.nan)
        if values.size == 0:
            raise ValueError("no rows to judge")
        return {"minimum": float(np.min(values)), "maximum": float(np.max(values)), "rows": int(values.size)}


class _Agreements(ColumnAggregateMetricProvider):  # type: ignore[misc]
    """Number of ones in a column of zeros and ones, and number of rows."""

    metric_name = "column.agreements"

    @column_aggregate_value(engine=PandasExecutionEngine, filter_column_isnull=False)  # type: ignore[untyped-decorator]
    def _pandas(cls, column: Any, **_: Any) -> dict[str, int]:  # noqa: N805 - as above
        if column.size == 0 or column.isna().any():
            raise ValueError("no rows to judge, or a missing value")
        return {"hits": int(column.sum()), "trials": int(column.size)}


class ExpectColumnMaximumToBeAtMost(ColumnAggregateExpectation):  # type: ignore[misc]
    """Every value is at most `limit`; NaN fails."""

    limit: float
    metric_dependencies: ClassVar[tuple[str, ...]] = ("column.strict_extremes",)
    success_keys: ClassVar[tuple[str, ...]] = ("limit",)

    def _validate(self, metrics: Any, runtime_configuration: Any = None, execution_engine: Any = None) -> Any:
        observed = metrics["column.strict_extremes"]
        return {
            "success": bool(observed["maximum"] <= self.limit),
            "result": {"observed_value": observed["maximum"], "details": {"rows": observed["rows"]}},
        }


class ExpectColumnMinimumToBeAtLeast(ColumnAggregateExpectation):  # type: ignore[misc]
    """Every value is at least `limit`; NaN fails."""

    limit: float
    metric_dependencies: ClassVar[tuple[str, ...]] = ("column.strict_extremes",)
    success_keys: ClassVar[tuple[str, ...]] = ("limit",)

    def _validate(self, metrics: Any, runtime_configuration: Any = None, execution_engine: Any = None) -> Any:
        observed = metrics["column.strict_extremes"]
        return {
            "success": bool(observed["minimum"] >= self.limit),
            "result": {"observed_value": observed["minimum"], "details": {"rows": observed["rows"]}},
        }


class ExpectRateToBeAtLeast(ColumnAggregateExpectation):  # type: ignore[misc]
    """The share of ones in a column is at least `limit`, and the rows are enough to show it.

    `details.decision` is `pass` if the rate is at least `limit` with 95 % confidence (one-sided lower bound: the
    compiled model is not inferior by more than 1 - `limit`), `fail` if an exact binomial test rejects a rate of
    `limit` at `level`, else `inconclusive`. A limit of 1 allows no miss, however many rows there are.
    """

    limit: float
    level: float
    metric_dependencies: ClassVar[tuple[str, ...]] = ("column.agreements",)
    success_keys: ClassVar[tuple[str, ...]] = ("limit", "level")

    def _validate(self, metrics: Any, runtime_configuration: Any = None, execution_engine: Any = None) -> Any:
        hits, trials = metrics["column.agreements"]["hits"], metrics["column.agreements"]["trials"]
        lower, upper = rate_bounds(hits, trials)
        missing_trials = None
        if self.limit >= 1.0:
            decision = "pass" if hits == trials else "fail"
        elif lower >= self.limit:
            decision = "pass"
        elif chance_of_fewer(hits, trials, self.limit) <= self.level:
            decision = "fail"
        else:
            decision = "inconclusive"
            missing_trials = trials_to_decide(hits, trials, self.limit, level=self.level)
        details = {
            "hits": hits, "trials": trials, "lower": lower, "upper": upper,
            "decision": decision, "more": missing_trials,
        }  # fmt: skip
        return {
            "success": decision == "pass",
            "result": {"observed_value": hits / trials, "details": details},
        }
