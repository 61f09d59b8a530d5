"""A user's suite: gates in a YAML file that are judged beside compileflow's own, checked before the compile."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError, field_validator, model_validator

from compileflow.errors import SpecError, first_line, first_problem
from compileflow.spec import GRAPH_TASKS, HfTask, Precision
from compileflow.validation.judge.suite import EXPECTATION_TYPES, Gate, GateEntry, GateFile, load_suite
from compileflow.validation.measure.metrics import compare

COMPARISON_COLUMNS = tuple(compare(np.ones(1), np.ones(1)))
_RATE_TYPE = "expect_rate_to_be_at_least"
_COLUMNS = {"comparisons": COMPARISON_COLUMNS, "rates": ("agrees",), "scalars": ("value",)}
_GATE_NAME, _SUITE_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}"), re.compile(r"[A-Za-z0-9][\w.-]{0,63}")
# Values of a file, each alias written out.
_MOST_VALUES = 100_000
# These loosen a gate, leave it out or move its place in the order.
_RESERVED = ("noise", "optional", "probe")


class _UserFile(GateFile):
    """The file of a user's suite: the form of compileflow's suite file, where a limit may also be a number."""

    @model_validator(mode="before")
    @classmethod
    def _plain_numbers_are_limits(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("gates"), list):
            return data
        limits, gates = dict(data.get("limits") or {}), []
        for gate in data["gates"]:
            if isinstance(gate, dict) and isinstance(gate.get("limit"), bool):
                raise ValueError(
                    f"gate {gate.get('gate')!r}: expected a number or the name of a limit, got {gate['limit']}"
                )
            limit = _number(gate.get("limit")) if isinstance(gate, dict) else None
            if limit is not None:
                name = f"limit of {gate.get('gate')}"
                limits[name] = dict.fromkeys(Precision, limit)
                gate = gate | {"limit": name}
            if isinstance(gate, dict) and gate.get("table") == "scalars":
                gate = {"column": "value"} | gate
            gates.append(gate)
        return data | {"limits": limits, "gates": gates}

    @field_validator("name")
    @classmethod
    def _name_is_plain(cls, name: str) -> str:
        if not _SUITE_NAME.fullmatch(name):
            raise ValueError("expected letters, digits, '.', '_' and '-'")
        if name == load_suite().name:
            raise ValueError("compileflow's own suite has this name; choose another one")
        return name

    @model_validator(mode="after")
    def _every_gate_can_be_judged(self) -> _UserFile:
        for name, table in (("limits", self.limits), *self.task_limits.items()):
            for limit, values in table.items():
                if not values or not all(map(math.isfinite, values.values())):
                    raise ValueError(f"{name}: expected a finite number for some precision in {limit!r}")
        unknown_tasks = set(self.task_limits) - set(GRAPH_TASKS)
        if unknown_tasks:
            raise ValueError(f"task_limits: {_other_task(min(unknown_tasks))}")
        for entry in self.gates:
            problem = _problem(entry)
            if problem:
                raise ValueError(f"gate {entry.gate!r}: {problem}")
            bounds = [bound for table in self._tables(entry) for bound in table.values()]
            if entry.table == "rates" and not all(0.0 <= bound <= 1.0 for bound in bounds):
                raise ValueError(f"gate {entry.gate!r}: expected a limit from 0 to 1 for a rate")
        return self

    def _tables(self, entry: GateEntry) -> Iterator[Mapping[Precision, float]]:
        return (self.limits_for(entry, task) for task in entry.tasks)


@dataclass(frozen=True)
class UserSuite:
    """A suite file of the user, whose form was checked.

    Attributes:
        file: Content of the file.
        text: Text of the file.
        origin: Name of the file, for messages.
    """

    file: GateFile
    text: str
    origin: str

    @property
    def name(self) -> str:
        """Name of the suite."""
        return self.file.name

    @property
    def digest(self) -> str:
        """SHA-256 of the file."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def names_outputs(self) -> bool:
        """Return whether a gate names an output, which only the loaded model has."""
        return any(entry.output is not None for entry in self.file.gates)

    def judges_latency(self) -> bool:
        """Return whether a gate reads the latency, which a busy machine leaves unjudged."""
        return any(entry.metric == "latency_ratio" for entry in self.file.gates)

    def gates_for(self, precision: Precision, task: HfTask) -> list[Gate]:
        """Return the gates that apply to a precision and a task, in the file's order."""
        return [
            Gate(entry, limits[precision], self.file.severity_at(entry, precision), self.name)
            for entry in self.file.gates
            if task.graph_task in entry.tasks and precision in (limits := self.file.limits_for(entry, task))
        ]

    def check(
        self, task: HfTask, precision: Precision | None = None, outputs: Collection[str] | None = None
    ) -> None:
        """Check that every gate finds what it judges.

        Args:
            task: Task of the compiled model.
            precision: Precision of the compiled model; None if it is not chosen yet.
            outputs: Names of the model's outputs; None if they are not known yet.

        Raises:
            SpecError: No gate applies, or a gate judges what is not measured.
        """
        precisions = [precision] if precision is not None else list(Precision)
        gates = {each: self.gates_for(each, task) for each in precisions}
        if not any(gates.values()):
            what = f"{task.value} at {precision.value}" if precision is not None else task.value
            raise self._refusal(
                f"no gate applies to {what}", "Give a limit for it, or leave the suite out for this model."
            )
        for each, applied_gates in gates.items():
            for gate in applied_gates:
                entry = gate.entry
                known_metrics = _metrics(entry.table, task, each if precision is not None else None)
                if entry.metric is not None and entry.metric not in known_metrics:
                    raise self._refusal(
                        f"gate {entry.gate!r}: {entry.metric} is not measured for {task.value} at {each.value}",
                        f"Measured in {entry.table} are: {', '.join(known_metrics) or 'none'}.",
                    )
                if outputs is not None and entry.output is not None and entry.output not in outputs:
                    raise self._refusal(
                        f"gate {entry.gate!r}: the model does not have the output {entry.output!r}",
                        f"Choose one of: {', '.join(outputs)}.",
                    )

    def _refusal(self, problem: str, hint: str) -> SpecError:
        return SpecError(f"The suite {self.origin} cannot be used: {problem}.", hint=hint)


def load_user_suite(path: str) -> UserSuite:
    """Read a user's suite file. Raises as `parse_user_suite` does."""
    try:
        text = Path(path).expanduser().read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SpecError(f"The suite {path} is not UTF-8.", hint="Save the file as UTF-8.") from error
    except (OSError, ValueError) as error:
        raise SpecError(
            f"The suite {path} cannot be read: {first_line(error)}.", hint="Check the path of --suite."
        ) from error
    return parse_user_suite(text, Path(path).name)


def parse_user_suite(text: str, origin: str) -> UserSuite:
    """Check the text of a user's suite file.

    Args:
        text: Text of the file.
        origin: Name of the file, for messages.

    Raises:
        SpecError: The text is not a suite: an expectation type, severity, column, task or metric is unknown, or a
            name is already that of one of compileflow's gates.
    """
    import yaml

    hint = "Correct the file. The form is that of compileflow/validation/suites/regression.yaml."
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        # A few lines of aliases, such as *name, stand for billions of values.
        if _size(root, {}) > _MOST_VALUES:
            raise ValueError(f"it stands for more than {_MOST_VALUES} values")
        repeated_key = _repeated_key(root) if root is not None else ""
        if repeated_key:
            raise ValueError(f"{repeated_key}: the key stands twice, and YAML keeps only the last one")
        data = yaml.safe_load(text)
        if not isinstance(data, dict):
            raise ValueError("expected schema_version, name, gates and limits")
        return UserSuite(_UserFile.model_validate(data), text, origin)
    except ValidationError as error:
        problem = first_problem(error, show_input=True)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        problem = f"{line}{error.problem}"
    except RecursionError:
        problem = "its lists or objects are nested too deeply"
    except (ValueError, yaml.YAMLError) as error:
        problem = first_line(error)
    raise SpecError(f"The suite {origin} cannot be used: {problem}.", hint=hint)


def _problem(entry: GateEntry) -> str:
    """Return why a gate cannot be judged, for any model; "" if it can."""
    reserved = [name for name in _RESERVED if name in entry.model_fields_set]
    known_metrics = _metrics(entry.table)
    if not _GATE_NAME.fullmatch(entry.gate):
        return "expected a name of lower-case letters, digits and '_'"
    if entry.gate in {own.gate for own in load_suite().gates}:
        return "compileflow has a gate of this name; choose another one"
    if entry.type not in EXPECTATION_TYPES:
        return f"unknown type {entry.type!r}; choose one of: {', '.join(EXPECTATION_TYPES)}"
    if reserved:
        return f"only compileflow's own gates have {reserved[0]!r}"
    if (entry.type == _RATE_TYPE) != (entry.table == "rates"):
        return f"the table {entry.table} does not fit the type {entry.type}"
    if entry.column not in _COLUMNS[entry.table]:
        return f"{entry.table} has no column {entry.column!r}; choose one of: {', '.join(_COLUMNS[entry.table])}"
    if entry.table == "comparisons" and entry.metric is not None:
        return "comparisons have columns, not metrics"
    if entry.table != "comparisons" and entry.output is not None:
        return "only comparisons have outputs"
    if entry.table != "comparisons" and entry.metric not in known_metrics:
        return f"unknown metric {entry.metric!r}; choose one of: {', '.join(known_metrics)}"
    other_tasks = [task for task in entry.tasks if task not in GRAPH_TASKS]
    if not entry.tasks or other_tasks:
        return f"tasks: {_other_task(other_tasks[0]) if other_tasks else 'the list is empty'}"
    return ""


def _metrics(table: str, task: HfTask | None = None, precision: Precision | None = None) -> list[str]:
    """Return the metrics of a table that compileflow measures; some only for a task, or at a precision."""
    suite = load_suite()
    metrics = {
        entry.metric
        for entry in suite.gates
        if entry.table == table
        and entry.metric is not None
        and (task is None or task.graph_task in entry.tasks)
        # Latency is measured at every precision, and has a limit at none.
        and (precision is None or precision in (suite.limits[entry.limit] or tuple(Precision)))
    }
    return sorted(metrics)


def _other_task(task: HfTask) -> str:
    return f"{task.value} has the gates of {task.graph_task.value}; write that"


def _number(value: object) -> float | None:
    """Return a number. YAML reads 1e-5, without a point, as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _size(node: Any, sizes: dict[int, float]) -> float:
    """Return how many values a node stands for, if each alias is written out; infinity if it contains itself."""
    if id(node) not in sizes:
        sizes[id(node)] = math.inf
        children = node.value if isinstance(getattr(node, "value", None), list) else []
        parts = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
        sizes[id(node)] = 1 + sum(_size(part, sizes) for part in parts)
    return sizes[id(node)]


def _repeated_key(node: Any) -> str:
    """Return the first key that a mapping has twice, with its line; "" if there is none."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        seen_keys = set()
        for key, _ in node.value:
            if str(key.value) in seen_keys:
                return f"line {key.start_mark.line + 1}: {key.value}"
            seen_keys.add(str(key.value))
        children = [value for _, value in node.value]
    else:
        children = node.value if isinstance(node, yaml.SequenceNode) else []
    return next((found for child in children if (found := _repeated_key(child))), "")
