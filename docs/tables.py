"""Write the tables in README.md and docs/ that come from code: python docs/tables.py [--check]."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from compileflow.artifact.runtime import runtime_needs
from compileflow.catalog import get_target, target_names
from compileflow.errors import CompileflowError
from compileflow.settings import Settings
from compileflow.spec import GRAPH_TASKS, HfTask, Precision
from compileflow.validation.suite import gates_for, load_suite

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "docs/artifact-format.md",
    "docs/configuration.md",
    "docs/operations.md",
    "docs/adding-a-target.md",
    "docs/tasks.md",
)
# Targets whose toolchains run on an ordinary machine; the others' cells would rest on doubles.
REAL_TARGETS = ("aot-inductor", "onnx-runtime", "openvino", "torchscript")
_BLOCK = re.compile(r"(<!-- table: (?P<name>[a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    names = list(header)
    lines = [names, ["---"] * len(names), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def targets() -> str:
    """Return every known target."""
    rows = []
    for name in target_names():
        target = get_target(name)
        can = target.capabilities
        options = ", ".join(f"`{option}`" for option in target.Options.model_fields) or "none"
        axes = "any shape" if can.dynamic_axes else "shape buckets"
        precisions = ", ".join(precision.value for precision in can.precisions)
        rows.append((f"`{name}`", target.summary, precisions, axes, options))
    return table(("target", "what it is", "precisions", "inputs", "options"), rows)


def runtimes() -> str:
    """Return which versions of its runtime each target needs."""
    rows = []
    for name in target_names():
        rules = get_target(name).capabilities.runtime
        needs = runtime_needs(rules, dict.fromkeys(rules, "2.9.1"))
        rows += [(f"`{name}`", f"`{distribution}`", f"`{versions}`") for distribution, versions in needs.items()]
    return table(("target", "distribution", "loads with"), rows)


def main_settings() -> str:
    """Return the settings that are not one service's own."""
    return settings(leave_out=("s3_", "neptune_", "signing_", "trusted_", "require_"))


def settings(leave_out: tuple[str, ...] = ()) -> str:
    """Return every setting with the variable that sets it, but those whose names begin with `leave_out`."""
    rows = []
    for name, field in Settings.model_fields.items():
        if name.startswith(leave_out):
            continue
        variable = field.validation_alias or f"COMPILEFLOW_{name.upper()}"
        value = field.get_default(call_default_factory=True)
        default = "" if value is None else f"`{value}`"
        rows.append((f"`{variable}`", default, field.description or ""))
    return table(("variable", "default", "what it is"), rows)


def errors() -> str:
    """Return the tree of errors."""
    rows: list[tuple[str, str, str]] = []

    def walk(kind: type[CompileflowError]) -> None:
        words = (kind.__doc__ or "").splitlines()[0]
        rows.append((f"`{kind.__name__}`", "yes" if kind.retryable else "no", words))
        for child in kind.__subclasses__():
            walk(child)

    walk(CompileflowError)
    return table(("error", "retried", "means"), rows)


def gates() -> str:
    """Return every gate with its limit for each precision, and for the tasks that have their own."""
    rows = []
    tasks = {task: {gate.entry.gate for gate in gates_for(Precision.FP32, task, {})} for task in GRAPH_TASKS}
    for entry in load_suite().gates:
        holders = [task for task, names in tasks.items() if entry.gate in names]
        limits = []
        for precision in Precision:
            found = {
                f"{gate.limit:g}{' (warns)' if gate.severity == 'warning' else ''}"
                for task in holders
                for gate in gates_for(precision, task, {})
                if gate.entry.gate == entry.gate
            }
            limits.append(" or ".join(sorted(found)) or "none")
        where = "all" if len(holders) == len(GRAPH_TASKS) else ", ".join(holders) or "when asked"
        rows.append((f"`{entry.gate}`", entry.says, where, *limits))
    return table(("gate", "what it says", "tasks", *(precision.value for precision in Precision)), rows)


def tasks() -> str:
    """Return every task: what a pipeline takes, whose pipeline answers, and the targets that compile it."""
    own = (HfTask.SENTENCE_SIMILARITY, HfTask.QUESTION_ANSWERING)
    able = {name: get_target(name).capabilities.hf_tasks for name in target_names()}
    rows = []
    for task in HfTask:
        cells = ["yes" if task in able[name] else "" for name in REAL_TARGETS]
        rows.append((f"`{task}`", task.modality, "compileflow's own" if task in own else "transformers'", *cells))
    return table(("task", "takes", "pipeline", *(f"`{name}`" for name in REAL_TARGETS)), rows)


TABLES: dict[str, Callable[[], str]] = {
    "targets": targets,
    "tasks": tasks,
    "runtimes": runtimes,
    "main-settings": main_settings,
    "settings": settings,
    "errors": errors,
    "gates": gates,
}


def rendered(page: str) -> str:
    """Return a page with its tables made anew."""
    text = (ROOT / page).read_text("utf-8")
    return _BLOCK.sub(lambda match: f"{match[1]}{TABLES[match['name']]()}{match[3]}", text)


def main() -> int:
    """Write the pages, or with --check only say which are stale."""
    stale = [page for page in PAGES if rendered(page) != (ROOT / page).read_text("utf-8")]
    if "--check" in sys.argv:
        sys.stderr.writelines(f"{page} is stale; run: python docs/tables.py\n" for page in stale)
        return 1 if stale else 0
    for page in stale:
        (ROOT / page).write_text(rendered(page), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
