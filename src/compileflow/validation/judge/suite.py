"""The suite file: the gates, their order, and their limits per precision and task."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from compileflow.errors import MeasurementError
from compileflow.spec import GRAPH_TASKS, HfTask, Precision

_FILE = "suites/regression.yaml"

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


class NoiseLimits(_Strict):
    """How far the source model's own noise moves a limit.

    Attributes:
        precisions: Precisions at which it does.
        factor: Multiple of the noise up to which a difference passes.
        most: Largest multiple of the limit.
    """

    precisions: tuple[Precision, ...]
    factor: float = Field(gt=1)
    most: float = Field(ge=1)


class GridLimit(_Strict):
    """How far the grid of the number format moves a limit.

    Attributes:
        factor: Multiple of what rounding the source model's numbers does.
        most: Largest value that passes; for a rate, the largest share of misses.
    """

    factor: float = Field(gt=1)
    most: float = Field(gt=0)


class SuiteFile(_Strict):
    """The whole suite file."""

    schema_version: Literal[1]
    name: str
    gates: tuple[GateEntry, ...] = Field(min_length=1)
    limits: dict[str, dict[Precision, float]]
    task_limits: dict[HfTask, dict[str, dict[Precision, float]]]
    warnings: dict[Precision, tuple[str, ...]]
    noise_limits: NoiseLimits
    grid_limits: dict[str, GridLimit]

    @model_validator(mode="after")
    def _names_are_known(self) -> SuiteFile:
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
        warning_gates = {gate for names in self.warnings.values() for gate in names}
        for table_name, names in (("warnings", warning_gates), ("grid_limits", set(self.grid_limits))):
            if names - gates:
                raise ValueError(f"{table_name} names unknown gates: {', '.join(sorted(names - gates))}")
        return self


@dataclass(frozen=True)
class Gate:
    """One gate with its limit and severity for one precision and task."""

    entry: GateEntry
    limit: float
    severity: Severity


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
        table = suite.limits[entry.limit] | suite.task_limits.get(task.graph_task, {}).get(entry.limit, {})
        limit = overrides.get(entry.limit, table.get(precision))
        if limit is not None:
            if strict and entry.table == "rates":
                limit = 1.0 - (1.0 - limit) / 10
            is_warning = entry.gate in suite.warnings.get(precision, ())
            gates.append(Gate(entry, limit, "warning" if is_warning else "critical"))
    if not gates:
        raise MeasurementError(f"The suite has no gate for {precision} {task}.", hint="Correct the suite file.")
    return gates


def _body() -> bytes:
    return (files("compileflow.validation") / _FILE).read_bytes()
