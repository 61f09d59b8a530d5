"""The suite file: the gates, their order, and their limits per precision and task."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from compileflow.errors import MeasurementError
from compileflow.spec import GRAPH_TASKS, HfTask, Precision

_FILE = "suites/regression.yaml"
# The classes in `expectations.py`, whose import takes seconds.
EXPECTATION_TYPES = (
    "expect_column_maximum_to_be_at_most",
    "expect_column_minimum_to_be_at_least",
    "expect_rate_to_be_at_least",
)

Severity = Literal["critical", "warning"]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GateEntry(_Strict):
    """One gate of the suite file."""

    gate: str
    says: str
    table: Literal["comparisons", "rates", "scalars"]
    type: str
    limit: str
    column: str = "agrees"
    metric: str | None = None
    output: str | None = Field(None, description="Output whose comparisons are judged. None: all outputs.")
    severity: Severity = Field("critical", description="Severity at precisions where `warnings` omits the gate.")
    missed: Literal["fail", "error"] = Field(
        "fail", description="Outcome of a critical gate beyond its limit: error where a comparison is missing."
    )
    tasks: tuple[HfTask, ...] = GRAPH_TASKS
    optional: tuple[HfTask, ...] = Field(
        (), description="Tasks whose models may lack the metric; the gate is then not judged."
    )
    noise: str | None = Field(
        None, description="Difference whose noise in the source model is the gate's floor; see `noise_limits`."
    )
    probe: bool = Field(
        False,
        description="The gate explains differences that rows without padding and token types do not have, so it "
        "names the verdict before a comparison that only other rows fail.",
    )

    @field_validator("optional", mode="before")
    @classmethod
    def _all_tasks(cls, value: object) -> object:
        return GRAPH_TASKS if value == "all" else value

    @property
    def source(self) -> str:
        """Name of what is judged: the metric, or the column of the comparisons."""
        return self.metric or self.column

    @property
    def is_maximum(self) -> bool:
        """Whether values up to the limit pass."""
        return self.type.endswith("at_most")


class NoiseLimit(_Strict):
    """How far the source model's own noise, or the rounding of its numbers, moves the limit of a difference.

    Attributes:
        factor: Multiple of the noise or rounding up to which a difference passes; its square for 1 - cosine.
        most: Largest multiple of the limit; its square for 1 - cosine.
    """

    factor: float = Field(gt=1)
    most: float = Field(ge=1)


class GridLimit(_Strict):
    """How far the grid of the number format moves a limit.

    Attributes:
        factor: Multiple of what rounding the source model's numbers does.
        most: Largest value that passes; for a rate, the largest share of misses.
        precisions: Precisions at which it moves the limit.
    """

    factor: float = Field(gt=1)
    most: float = Field(gt=0)
    precisions: tuple[Precision, ...] = (Precision.FP16, Precision.BF16, Precision.INT8, Precision.INT4)


class GateFile(_Strict):
    """The gates of a suite file, with their limits."""

    schema_version: Literal[1]
    name: str
    gates: tuple[GateEntry, ...] = Field(min_length=1)
    limits: dict[str, dict[Precision, float]]
    task_limits: dict[HfTask, dict[str, dict[Precision, float]]] = Field(default_factory=dict)
    warnings: dict[Precision, tuple[str, ...]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        """Refuse misspelt names: a gate without a limit would vanish, and a vanished gate passes."""
        used_limits = {entry.limit for entry in self.gates}
        for task, table in (("limits", self.limits), *self.task_limits.items()):
            if set(table) - used_limits:
                raise ValueError(f"{task}: no gate uses {', '.join(sorted(set(table) - used_limits))}")
        missing_limits = used_limits - set(self.limits)
        if missing_limits:
            raise ValueError(f"limits has no {', '.join(sorted(missing_limits))}")
        gates = {entry.gate for entry in self.gates}
        if len(gates) != len(self.gates):
            raise ValueError("two gates share a name")
        named_gates = {gate for names in self.warnings.values() for gate in names}
        if named_gates - gates:
            raise ValueError(f"warnings names unknown gates: {', '.join(sorted(named_gates - gates))}")
        return self

    def limits_for(self, entry: GateEntry, task: HfTask) -> dict[Precision, float]:
        """Return the limits of a gate for a task, by precision."""
        return self.limits[entry.limit] | self.task_limits.get(task.graph_task, {}).get(entry.limit, {})

    def severity_at(self, entry: GateEntry, precision: Precision) -> Severity:
        """Return the severity of a gate at a precision."""
        return "warning" if entry.gate in self.warnings.get(precision, ()) else entry.severity


class SuiteFile(GateFile):
    """The whole suite file of compileflow."""

    noise_limits: dict[Precision, NoiseLimit]
    grid_limits: dict[str, GridLimit]

    @model_validator(mode="after")
    def _grid_limits_are_known(self) -> Self:
        unknown_gates = set(self.grid_limits) - {entry.gate for entry in self.gates}
        if unknown_gates:
            raise ValueError(f"grid_limits names unknown gates: {', '.join(sorted(unknown_gates))}")
        return self


@dataclass(frozen=True)
class Gate:
    """One gate with its limit and severity for one precision and task.

    Attributes:
        entry: Entry of the suite file.
        limit: Limit for the precision and the task.
        severity: Severity at the precision.
        suite: Name of the user's suite that has the gate; "" for compileflow's own.
    """

    entry: GateEntry
    limit: float
    severity: Severity
    suite: str = ""


@lru_cache(maxsize=1)
def load_suite() -> SuiteFile:
    """Read the suite file.

    Raises:
        pydantic.ValidationError: The file has an unknown entry.
    """
    import yaml

    return SuiteFile.model_validate(yaml.safe_load(_body()))


def suite_digest() -> str:
    """Return the SHA-256 of the suite file."""
    return hashlib.sha256(_body()).hexdigest()


def gates_for(
    precision: Precision, task: HfTask, overrides: Mapping[str, float], *, strict: bool = False
) -> list[Gate]:
    """Return the gates to judge, in the suite's order.

    Args:
        precision: Precision of the compiled model.
        task: Task of the compiled model.
        overrides: Value of each limit that the target or the user sets.
        strict: Allow a tenth of the changed decisions: 0.1 % where the suite allows 1 %.

    Raises:
        MeasurementError: The suite has no gate for them; judging nothing would pass.
    """
    suite = load_suite()
    gates = []
    for entry in suite.gates:
        if task.graph_task not in entry.tasks:
            continue
        limit = overrides.get(entry.limit, suite.limits_for(entry, task).get(precision))
        if limit is not None:
            if strict and entry.table == "rates":
                limit = 1.0 - (1.0 - limit) / 10
            gates.append(Gate(entry, limit, suite.severity_at(entry, precision)))
    if not gates:
        raise MeasurementError(f"The suite has no gate for {precision} {task}.", hint="Correct the suite file.")
    return gates


def _body() -> bytes:
    return (files("compileflow.validation") / _FILE).read_bytes()
