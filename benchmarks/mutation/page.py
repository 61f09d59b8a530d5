"""page: docs/reference/mutation.md, the measured error rate of the gates, and the limits that it must keep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.mutation.faults import FAULTS

# Share of the visible faults that a gate names, and of the honest compiles that may be refused.
LEAST_CAUGHT = 0.98
MOST_REFUSED = {"fp32": 0.0, "bf16": 0.01}
_ACCEPTED = ("pass", "warn")
# The step before the proof refused: there is no artifact to judge.
_NOT_JUDGED = ("no compile", "no plant", "no result")
Line = Mapping[str, Any]


def is_caught(line: Line) -> bool:
    """Return True if a fault fails, or is refused with an error."""
    return line["outcome"] in ("fail", "error", "refused")


def is_named(line: Line) -> bool:
    """Return True if a fault fails, and a gate that may name it is among those that block."""
    return is_caught(line) and bool(set(line["gates"]) & set(FAULTS[line["name"]].gates))


def missed_limits(lines: Sequence[Line]) -> list[str]:
    """Return a sentence for each limit that the results miss, and for each fault and compile that misses it."""
    problems = []
    visible = [line for line in lines if line["check"] == "fault" and line["visible"]]
    unnamed = [line for line in visible if not is_named(line)]
    if visible and len(unnamed) / len(visible) > 1 - LEAST_CAUGHT:
        share = 1 - len(unnamed) / len(visible)
        problems.append(f"A named gate caught {share:.1%} of the visible faults; the limit is {LEAST_CAUGHT:.0%}.")
        problems += [f"  {line['name']}: {line['outcome']}: {line['reason'][:120]}" for line in unnamed]
    for precision, limit in MOST_REFUSED.items():
        judged = _judged(lines, precision)
        refused = [line for line in judged if line["outcome"] not in _ACCEPTED]
        if judged and len(refused) / len(judged) > limit:
            share = len(refused) / len(judged)
            problems.append(
                f"{share:.1%} of the honest {precision} compiles are refused; the limit is {limit:.0%}."
            )
            problems += [f"  {line['name']}: {line['outcome']}: {line['reason'][:120]}" for line in refused]
    problems += [f"No result of {line['name']}: {line['reason']}" for line in lines if _has_no_result(line)]
    return problems


def newest(check: str, name: str, key: str, results: Mapping[str, Line]) -> Line | None:
    """Return a check's result: that of its key, or else the last one of other versions; None without one."""
    if key in results:
        return results[key]
    older = [line for line in results.values() if (line["check"], line["name"]) == (check, name)]
    return older[-1] if older else None


def page(lines: Mapping[str, Line | None]) -> str:
    """Return the page as Markdown.

    Args:
        lines: Result of each check by key; None where there is none.
    """
    made = [line for line in lines.values() if line]
    failed = sum(map(_has_no_result, made))
    older = sum(line is not None and line["key"] != key for key, line in lines.items())
    faults = [line for line in made if line["check"] == "fault" and not _has_no_result(line)]
    honest = [line for line in made if line["check"] == "honest"]
    versions = _versions(line["versions"] for line in made)
    # One digest for each task and precision.
    versions.pop("gates", None)
    parts = [
        _INTRODUCTION.format(caught=LEAST_CAUGHT, bf16=MOST_REFUSED["bf16"]),
        f"Measured by version {versions.pop('measurements', 'none')} of the measuring code.\n",
        "Libraries: " + ", ".join(f"{name} {numbers}" for name, numbers in sorted(versions.items())) + ".\n",
        f"{len(made)} of {len(lines)} checks have been run; a check is one planted fault or one honest compile.\n",
        *([f"{failed} of them ended without a verdict.\n"] if failed else []),
        *([_OLDER.format(older="All" if older == len(made) else older)] if older else []),
        *(f"**{sentence}**\n" for sentence in missed_limits(made) if not sentence.startswith(" ")),
        "## Summary\n",
        _summary(faults, made),
        "## Faults by the part at fault\n",
        _by_kind(faults),
        "## Gates that name the faults\n",
        "Each refused artifact counts once: under the gate that its verdict names, or under the error that\n"
        "refused it before it was measured.\n",
        _by_gate(faults),
        "## Honest compiles\n",
        _honest(honest),
        "## Every fault\n",
        _every_fault(faults),
        "## Honest compiles that did not pass\n",
        _not_passed(honest),
    ]
    return "\n".join(parts).rstrip() + "\n"


_OLDER = """{older} of these results were measured with an earlier version of the gates or of the
measurements. They do not describe the current version until `make mutation` has run again.
"""
_INTRODUCTION = """# Error rate of the gates

This page is generated. It shows how often a verdict is wrong, in both directions.

**Faults** are planted on purpose, one in each artifact: in weights, graphs, interface files and manifests, in
artifacts at bf16 and int8, and at run time, where a graph answers wrongly only in some calls. A fault is
**visible** if it makes the pipeline raise an error that the source model's pipeline does not raise, or if an
answer has another text, label or position, a score that differs by at least 0.001, or an embedding that
differs by at least a thousandth of its length. The benchmark looks for such changes on inputs that the
validation does not use. For each fault, it lists the gates that are meant to find it. At least {caught:.0%}
of the artifacts with a visible fault must get the verdict fail, and one of these gates must be among those
that fail.

**Honest compiles** are compiles without a fault, most of them of small models with three kinds of weights: large
random ones, those that transformers gives a new model, and trained ones. No honest fp32 compile may be refused. Of
the honest bf16 compiles, at most {bf16:.0%} may be refused.

Regenerate the page with `make mutation`, which fails if a limit is missed. The results are kept in `.mutation/`; a
run continues where it stopped.
"""


def _versions(texts: Iterable[str]) -> dict[str, str]:
    """Return the versions of each library or part in texts of names and versions."""
    numbers: dict[str, set[str]] = {}
    for text in texts:
        words = text.split()
        for name, version in zip(words[::2], words[1::2], strict=True):
            numbers.setdefault(name, set()).add(version)
    return {name: ", ".join(sorted(versions)) for name, versions in numbers.items()}


def _table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    names = list(header)
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in [names, ["---"] * len(names), *cells])


def _judged(lines: Sequence[Line], precision: str) -> list[Line]:
    return [
        line
        for line in lines
        if line["check"] == "honest" and line["precision"] == precision and line["outcome"] not in _NOT_JUDGED
    ]


def _has_no_result(line: Line) -> bool:
    return bool(line["outcome"] in ("no result", "no plant"))


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({part / whole:.1%})" if whole else "not measured yet"


def _summary(faults: Sequence[Line], made: Sequence[Line]) -> str:
    visible = [line for line in faults if line["visible"]]
    rows: list[tuple[str, str, str]] = [
        (
            "visible faults that fail by a gate meant for them",
            _share(sum(map(is_named, visible)), len(visible)),
            f"at least {LEAST_CAUGHT:.0%}",
        ),
        ("visible faults that fail", _share(sum(map(is_caught, visible)), len(visible)), ""),
        (
            "visible faults whose verdict names a gate meant for them",
            _share(sum(naming_gate(line) in FAULTS[line["name"]].gates for line in visible), len(visible)),
            "",
        ),
    ]
    for precision in ("fp32", "bf16", "int8"):
        judged = _judged(made, precision)
        refused = sum(line["outcome"] not in _ACCEPTED for line in judged)
        limit = MOST_REFUSED.get(precision)
        words = "" if limit is None else f"at most {limit:.0%}"
        rows.append((f"honest {precision} compiles that are refused", _share(refused, len(judged)), words))
    return _table(("measured", "result", "limit"), rows)


def naming_gate(line: Line) -> str:
    """Return the gate or the class of error that a verdict's reason names; "" if the fault is not caught."""
    words = line["reason"].replace(":", " ").split()
    return {"fail": words[1], "error": words[1], "refused": words[0]}[line["outcome"]] if is_caught(line) else ""


def _by_kind(faults: Sequence[Line]) -> str:
    rows = []
    for kind in [*dict.fromkeys(line["kind"] for line in faults), "all"]:
        group = [line for line in faults if kind in (line["kind"], "all")]
        visible = [line for line in group if line["visible"]]
        outcomes = Counter(line["outcome"] for line in visible)
        caught = sum(map(is_caught, visible))
        rows.append(
            (
                f"**{kind}**" if kind == "all" else kind,
                len(group),
                len(visible),
                caught,
                sum(map(is_named, visible)),
                outcomes["warn"],
                outcomes["pass"],
                sum(map(is_caught, group)) - caught,
            )
        )
    header = (
        "part",
        "planted",
        "visible",
        "visible: fail",
        "visible: fail by a gate meant for them",
        "visible: warn",
        "visible: pass",
        "not visible: fail",
    )
    return _table(header, rows)


def _by_gate(faults: Sequence[Line]) -> str:
    kinds = list(dict.fromkeys(line["kind"] for line in faults))
    counts = Counter((naming_gate(line), line["kind"]) for line in faults if is_caught(line))
    totals = Counter(naming_gate(line) for line in faults if is_caught(line))
    rows = [
        (f"`{gate}`", *(counts[gate, kind] or "" for kind in kinds), total) for gate, total in totals.most_common()
    ]
    return _table(("gate", *kinds, "all"), rows)


def _honest(honest: Sequence[Line]) -> str:
    rows = []
    groups = sorted({(line["target"], line["precision"]) for line in honest})
    for target, precision in groups:
        group = [line for line in honest if (line["target"], line["precision"]) == (target, precision)]
        outcomes = Counter(
            "not compiled" if line["outcome"] == "no compile" else line["outcome"] for line in group
        )
        refused = sum(outcomes[name] for name in ("fail", "error", "refused"))
        rows.append(
            (
                f"`{target}`",
                precision,
                len(group) - outcomes["not compiled"],
                outcomes["pass"],
                outcomes["warn"],
                refused,
                outcomes["not compiled"],
            )
        )
    header = ("target", "precision", "judged", "pass", "warn", "refused", "not compiled")
    return _table(header, rows)


def _every_fault(faults: Sequence[Line]) -> str:
    rows = [
        (
            line["name"],
            line["kind"],
            f"{line['task']}, {line['target']}",
            line["visible"] or "nowhere",
            line["outcome"],
            ", ".join(f"`{gate}`" for gate in line["gates"][:3]) + (", ..." if len(line["gates"]) > 3 else ""),
        )
        for line in faults
    ]
    return _table(("fault", "part", "model and target", "visible in", "verdict", "gates"), rows)


def _not_passed(honest: Sequence[Line]) -> str:
    rows = [(line["name"], line["outcome"], line["reason"]) for line in honest if line["outcome"] != "pass"]
    return _table(("compile", "outcome", "reason"), rows) if rows else "None.\n"
