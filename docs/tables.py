"""Write the tables in README.md and docs/ that come from code: python docs/tables.py [--check]."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import typer

from compileflow.artifact.runtime import runtime_needs
from compileflow.catalog import get_target, target_names
from compileflow.cli import app
from compileflow.errors import CompileflowError
from compileflow.settings import Settings, variable_of
from compileflow.spec import GRAPH_TASKS, HfTask, Precision
from compileflow.validation.judge.suite import gates_for, load_suite

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "docs/reference/cli.md",
    "docs/reference/errors.md",
    "docs/reference/gates.md",
    "docs/reference/settings.md",
    "docs/reference/targets.md",
    "docs/reference/tasks.md",
    "docs/explanation/artifact-format.md",
)
# Targets whose toolchains run on an ordinary machine; the others were only tested against doubles.
REAL_TARGETS = ("aot-inductor", "onnx-runtime", "openvino", "torchscript")
_BLOCK = re.compile(r"(<!-- table: (?P<name>[a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    names = list(header)
    lines = [names, ["---"] * len(names), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def targets() -> str:
    """Return every known target in short."""
    rows = []
    for name in target_names():
        target = get_target(name)
        capabilities = target.capabilities
        precisions = ", ".join(capabilities.precisions)
        extra = [
            precision for precision in capabilities.all_precisions if precision not in capabilities.precisions
        ]
        if extra:
            precisions += f"; for text-generation also {', '.join(extra)}"
        rows.append((f"`{name}`", target.summary, precisions))
    return table(("target", "what it is", "precisions"), rows)


def target_inputs() -> str:
    """Return the shapes and devices of every known target."""
    rows = []
    for name in target_names():
        capabilities = get_target(name).capabilities
        inputs = "any shape" if capabilities.dynamic_axes else "shape buckets"
        rows.append((f"`{name}`", inputs, ", ".join(capabilities.devices)))
    return table(("target", "inputs", "devices"), rows)


def target_options() -> str:
    """Return the options of every target that has some, one table for each."""
    sections = []
    for name in target_names():
        fields = get_target(name).Options.model_fields
        rows = [
            (
                f"`{option}`",
                f"`{json.dumps(field.get_default(call_default_factory=True))}`",
                field.description or "",
            )
            for option, field in fields.items()
        ]
        if rows:
            sections.append(f"### {name}\n\n{table(('option', 'default', 'what it does'), rows)}")
    return "\n".join(sections)


def commands() -> str:
    """Return every command of `compileflow` with its arguments and options, grouped as in its help."""
    group: Any = typer.main.get_command(app)
    sections = []
    for name, command in sorted(group.commands.items()):
        usage = [f"compileflow {name}", *(_usage(p) for p in command.params if _is_argument(p)), "[OPTIONS]"]
        text = inspect.cleandoc(command.help or "").split("\f")[0].strip()
        sections.append(f"## compileflow {name}\n\n{text}\n\n```text\n{' '.join(usage)}\n```\n")
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in command.params:
            panel = parameter.rich_help_panel or "argument or option"
            cell = f"`{_spelling(parameter)}`".replace(", ", "`, `")
            panels.setdefault(panel, []).append((cell, (parameter.help or "").strip() + _default(parameter)))
        sections += [table((panel, "what it does"), rows) for panel, rows in panels.items()]
    return "\n".join(sections)


def _is_argument(parameter: Any) -> bool:
    return isinstance(parameter, typer.core.TyperArgument)


def _usage(argument: Any) -> str:
    return _spelling(argument) if argument.required else f"[{_spelling(argument)}]"


def _default(parameter: Any) -> str:
    """Return the default of a parameter as a sentence; '' for a switch, and for one that has none."""
    return f" Default: {parameter.default}." if parameter.default and not parameter.is_flag else ""


def _spelling(parameter: Any) -> str:
    if _is_argument(parameter):
        return str(parameter.metavar or parameter.name.upper())
    value = f" {parameter.metavar}" if parameter.metavar else ""
    return ", ".join((*parameter.opts, *parameter.secondary_opts)) + value


def runtimes() -> str:
    """Return the runtime versions that each target loads with."""
    rows = []
    for name in target_names():
        rules = get_target(name).capabilities.runtime
        needs = runtime_needs(rules, dict.fromkeys(rules, "2.9.1"))
        rows += [(f"`{name}`", f"`{distribution}`", f"`{versions}`") for distribution, versions in needs.items()]
    return table(("target", "distribution", "loads with"), rows)


def settings() -> str:
    """Return every setting with the variable that sets it."""
    rows = []
    for name, field in Settings.model_fields.items():
        value = field.get_default(call_default_factory=True)
        default = "" if value is None else f"`{value}`"
        rows.append((f"`{variable_of(name)}`", default, field.description or ""))
    return table(("variable", "default", "what it sets"), rows)


def errors() -> str:
    """Return the tree of errors."""
    rows: list[tuple[str, str, str]] = []

    def walk(kind: type[CompileflowError]) -> None:
        summary = (kind.__doc__ or "").splitlines()[0]
        rows.append((f"`{kind.__name__}`", "yes" if kind.retryable else "no", summary))
        for child in kind.__subclasses__():
            walk(child)

    walk(CompileflowError)
    return table(("error", "retried", "meaning"), rows)


def gates() -> str:
    """Return every gate with its limit for each precision and the tasks that it holds for."""
    rows = []
    gate_names = {
        task: {gate.entry.gate for precision in Precision for gate in gates_for(precision, task, {})}
        for task in GRAPH_TASKS
    }
    for entry in load_suite().gates:
        gate_tasks = [task for task, names in gate_names.items() if entry.gate in names]
        cells = []
        for precision in Precision:
            limits = {
                f"{gate.limit:g}{' (warns)' if gate.severity == 'warning' else ''}"
                for task in gate_tasks
                for gate in gates_for(precision, task, {})
                if gate.entry.gate == entry.gate
            }
            cells.append(" or ".join(sorted(limits)) or "none")
        scope = "all" if len(gate_tasks) == len(GRAPH_TASKS) else ", ".join(gate_tasks) or "on request"
        passes = "at most" if entry.type.endswith("at_most") else "at least"
        rows.append((f"`{entry.gate}`", entry.says, scope, passes, *cells))
    return table(
        ("gate", "what it checks", "tasks", "passes", *(precision.value for precision in Precision)), rows
    )


def tasks() -> str:
    """Return every task with its input, the pipeline that answers, and the targets that compile it."""
    supported_tasks = {name: get_target(name).capabilities.hf_tasks for name in target_names()}
    rows = []
    for task in HfTask:
        cells = ["yes" if task in supported_tasks[name] else "" for name in REAL_TARGETS]
        rows.append((f"`{task}`", task.modality, task.pipeline_owner or "none", *cells))
    return table(("task", "input", "pipeline", *(f"`{name}`" for name in REAL_TARGETS)), rows)


TABLES: dict[str, Callable[[], str]] = {
    "targets": targets,
    "target-inputs": target_inputs,
    "target-options": target_options,
    "commands": commands,
    "tasks": tasks,
    "runtimes": runtimes,
    "settings": settings,
    "errors": errors,
    "gates": gates,
}


def rendered(page: str) -> str:
    """Return a page with its tables written again."""
    text = (ROOT / page).read_text("utf-8")
    return _BLOCK.sub(lambda match: f"{match[1]}{TABLES[match['name']]()}{match[3]}", text)


def main() -> int:
    """Write the pages, or with --check name the stale ones and return 1."""
    stale = [page for page in PAGES if rendered(page) != (ROOT / page).read_text("utf-8")]
    if "--check" in sys.argv:
        sys.stderr.writelines(f"{page} is stale; run: python docs/tables.py\n" for page in stale)
        return 1 if stale else 0
    for page in stale:
        (ROOT / page).write_text(rendered(page), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
