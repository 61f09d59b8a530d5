"""page: docs/reference/architectures.md, the table of tasks, architectures and targets, from a sweep's results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.architectures.check import LARGEST_TOLERANCE, ROUNDINGS, TOLERANCE
from benchmarks.architectures.classes import list_digest
from benchmarks.architectures.sweep import ALL_CLASSES_TARGETS, SAMPLE_TARGETS, in_sample, key_of
from benchmarks.architectures.tiny_models import ModelClass
from compileflow.spec import HfTask

TARGETS = (*ALL_CLASSES_TARGETS, *SAMPLE_TARGETS)
_NOT_RUN = {"outcome": "not run", "reason": ""}
_MARKS = {"works": "works", "refused": "refused", "fails": "fails", "transformers": "", None: "not run"}
Results = Mapping[str, Mapping[str, Any]]


def page(classes: Sequence[ModelClass], results: Results) -> str:
    """Return the page as Markdown.

    Args:
        classes: All classes of the sweep.
        results: Results by key, as `read_results` returns them.
    """
    lines = {
        (model_class, target): results.get(key_of(model_class, target))
        for model_class in classes
        for target in TARGETS
        if target in ALL_CLASSES_TARGETS or in_sample(model_class)
    }
    missing = sum(line is None for line in lines.values())
    progress = f"{missing} of {len(lines)} combinations of class and target have not been run yet.\n"
    parts = [
        _INTRODUCTION.format(tolerance=TOLERANCE, roundings=ROUNDINGS, largest=LARGEST_TOLERANCE),
        f"<!-- classes: {list_digest()} -->\n",
        f"Versions: {named_versions(line for line in lines.values() if line)}.\n",
        "## Summary\n",
        "Each cell counts the classes that work, out of the classes that the sweep has tried and that "
        "transformers can build and call. `none` means that none has been tried.\n",
        *([progress] if missing else []),
        _summary(classes, lines),
        "## Architectures that the optimum projects test\n",
        "The percentages count only the architectures that transformers 5 can build here. The names are those of "
        "the projects' tests.\n",
        _peers(classes, lines),
        "## Every class\n",
        _every_class(classes, lines),
        "## Refused and failing classes\n",
        _problems(classes, lines, ("refused", "fails")),
        "## Classes that transformers cannot build or run here\n",
        "Most need inputs of another kind, or a library that is not installed. They are not counted.\n",
        _problems(classes, lines, ("transformers",)),
    ]
    return "\n".join(parts).rstrip() + "\n"


_INTRODUCTION = """# Architectures

This page is generated. It shows which of transformers' model classes compile for which target.

A class **works** if a small random model of it compiles and answers like transformers: each row alone, all rows
in one list, and a padded batch of short and long rows. In fp32, the relative difference is at most
{tolerance:g}, or {roundings} times the rounding of transformers' own answers if that is more, but never more than
{largest:g}. A class is **refused** if compileflow says in one line, before anything is compiled,
why it cannot compile it. A class **fails** if its compile ends with another error, if it does not answer in
time, or if it answers differently.

The sweep plans onnx-runtime and openvino for every class, and torchscript and aot-inductor for every third
class. A dash means that a combination is not planned. `not run` means that the sweep has not reached it yet. A
blank cell in the tables of classes means that transformers itself cannot build or run the class here.

Regenerate the page with `make architectures`. The sweep keeps its results in `.architectures/` and continues where
it stopped; it takes hours on two cores.
"""


def named_versions(lines: Iterable[Mapping[str, Any]]) -> str:
    """Return the versions that some results name, as words of a sentence."""
    words = [line["versions"].split() for line in lines]
    pairs = {f"{name} {version}" for line in words for name, version in zip(line[::2], line[1::2], strict=True)}
    return ", ".join(sorted(pairs))


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table as Markdown."""
    names = list(header)
    lines = [names, ["---"] * len(names), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _share(outcomes: Counter[str]) -> str:
    counted = outcomes["works"] + outcomes["refused"] + outcomes["fails"]
    return f"{outcomes['works']} of {counted} ({outcomes['works'] / counted:.1%})" if counted else ""


def _summary(classes: Sequence[ModelClass], lines: Mapping[tuple[ModelClass, str], Any]) -> str:
    rows = []
    for task in [*dict.fromkeys(model_class.hf_task for model_class in classes), None]:
        cells = []
        for target in TARGETS:
            outcomes = Counter(
                line["outcome"]
                for (model_class, name), line in lines.items()
                if line and name == target and task in (None, model_class.hf_task)
            )
            cells.append(_share(outcomes) or "none")
        rows.append((f"`{task.value}`" if task else "**all**", *cells))
    return table(("task", *(f"`{target}`" for target in TARGETS)), rows)


def _peers(classes: Sequence[ModelClass], lines: Mapping[tuple[ModelClass, str], Any]) -> str:
    peers = yaml.safe_load((Path(__file__).parent / "peers.yaml").read_text("utf-8"))
    aliases = peers.pop("aliases")
    by_name = {(model_class.hf_task.value, model_class.model_type): model_class for model_class in classes}
    text = ""
    for peer, entry in peers.items():
        outcomes: dict[str, Counter[str]] = {target: Counter() for target in ALL_CLASSES_TARGETS}
        problems = []
        for task, architectures in entry["tasks"].items():
            graph_task = HfTask(task).graph_task.value
            for architecture in architectures:
                model_class = by_name.get((graph_task, aliases.get(architecture, architecture)))
                if model_class is None:
                    problems.append(
                        (f"`{task}`", architecture, "", "", "transformers 5 has no such class for the task")
                    )
                    continue
                for target in ALL_CLASSES_TARGETS:
                    line = lines.get((model_class, target)) or _NOT_RUN
                    outcomes[target][line["outcome"]] += 1
                    if line["outcome"] not in ("works", "not run"):
                        problems.append((f"`{task}`", architecture, target, line["outcome"], line["reason"]))
        shares = "; ".join(_progress(target, outcomes[target]) for target in ALL_CLASSES_TARGETS)
        text += f"**{peer}**, `{entry['file']}` at `{entry['commit'][:12]}`: {shares}.\n\n"
        if problems:
            text += table(("task", "architecture", "target", "outcome", "reason"), problems) + "\n"
    return text


def _progress(target: str, outcomes: Counter[str]) -> str:
    missing = f", {outcomes['not run']} not run" if outcomes["not run"] else ""
    return f"{target}: {_share(outcomes) or 'none'} work{missing}"


def _every_class(classes: Sequence[ModelClass], lines: Mapping[tuple[ModelClass, str], Any]) -> str:
    text = ""
    for task in dict.fromkeys(model_class.hf_task for model_class in classes):
        rows = []
        for model_class in classes:
            if model_class.hf_task is task:
                cells = []
                for target in TARGETS:
                    line = lines.get((model_class, target))
                    skipped = (model_class, target) not in lines
                    cells.append("-" if skipped else _MARKS[line["outcome"] if line else None])
                rows.append((f"`{model_class.model_type}`", model_class.name, *cells))
        text += f"### {task.value}\n\n" + table(("model type", "class", *TARGETS), rows) + "\n"
    return text


def _problems(
    classes: Sequence[ModelClass], lines: Mapping[tuple[ModelClass, str], Any], outcomes: tuple[str, ...]
) -> str:
    """Return one row for each reason with the classes that it holds for."""
    targets_of: dict[tuple[str, str, str], list[str]] = {}
    for (model_class, target), line in lines.items():
        if line and line["outcome"] in outcomes:
            name = f"{model_class.name} ({model_class.hf_task.value})"
            targets_of.setdefault((line["outcome"], line["reason"] or line["stage"], name), []).append(target)
    if not targets_of:
        return "None.\n"
    groups: dict[tuple[str, str, str], list[str]] = {}
    for (outcome, reason, name), targets in targets_of.items():
        groups.setdefault((outcome, reason, ", ".join(sorted(targets, key=TARGETS.index))), []).append(name)
    rows = []
    for (outcome, reason, target_names), names in sorted(
        groups.items(), key=lambda group: (-len(group[1]), group[0])
    ):
        cells = (", ".join(names), target_names, reason)
        rows.append(cells if outcomes == ("transformers",) else (outcome, *cells))
    header = ("classes", "targets", "reason")
    return table(header if outcomes == ("transformers",) else ("outcome", *header), rows)
