"""decoder_page: docs/reference/decoders.md, the table of decoders that generate, from a sweep's results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.architectures.classes import DECODER_TASKS, list_digest
from benchmarks.architectures.decoders import NEW_TOKENS
from benchmarks.architectures.page import Results, named_versions, table
from benchmarks.architectures.sweep import DECODER_TARGETS, DECODER_TIME_LIMIT_S, key_of
from benchmarks.architectures.tiny_models import ModelClass

_OUTCOMES = ("yes", "refused", "wrong", "fails", "not built", "not run")


def decoder_page(classes: Sequence[ModelClass], results: Results) -> str:
    """Return the page as Markdown.

    Args:
        classes: All decoders.
        results: Results by key, as `read_results` returns them.
    """
    lines = {
        model_class: {target: results.get(key_of(model_class, target)) for target in DECODER_TARGETS}
        for model_class in classes
    }
    outcomes = {
        model_class: [_outcome(line) for line in by_target.values()] for model_class, by_target in lines.items()
    }
    complete = [line for by_target in lines.values() for line in by_target.values() if line]
    exact = sum(set(cells) == {"yes"} for cells in outcomes.values())
    parts = [
        _INTRODUCTION.format(tokens=NEW_TOKENS, limit=DECODER_TIME_LIMIT_S),
        f"<!-- classes: {list_digest(DECODER_TASKS)} -->\n",
        f"Processor: {', '.join(sorted({line['processor'] for line in complete}))}. "
        f"Versions: {named_versions(complete)}.\n",
        "## Summary\n",
        f"{exact} of {len(classes)} model types write the same tokens on both `openvino` and `onnx-runtime`.\n",
        _summary(list(outcomes.values())),
        "## Every decoder\n",
        table(
            ("model type", "class", *(f"`{target}`" for target in DECODER_TARGETS)),
            ((f"`{model_class.model_type}`", model_class.name, *cells) for model_class, cells in outcomes.items()),
        ),
        "## Refused, wrong and failing decoders\n",
        _reasons(lines, ("refused", "wrong", "fails")),
        "## Decoders that transformers cannot build or run here\n",
        "Most need inputs besides text, or a configuration that does not follow from that of other classes.\n",
        _reasons(lines, ("not built",)),
    ]
    return "\n".join(parts).rstrip() + "\n"


_INTRODUCTION = """# Decoders

This page is generated. It shows which of transformers' decoders compile for
[text generation](../how-to/generate-text.md).

- **yes**: a small random model of the class, compiled in fp32, writes the same {tokens} tokens as in transformers
  after each of three prompts, which are padded on the left. It does so again in a second request, and after one of
  the prompts alone. Two tokens may change places only at a [near tie](gates.md).
- **refused**: the compile ends with one line, which says why, and leaves no artifact.
- **wrong**: the compiled model writes other tokens.
- **fails**: the compile crashes, or takes longer than {limit} s of processor time.
- **not built**: transformers itself cannot build a small model of the class here, or cannot run it on text alone.

The list holds every model type that transformers maps to a causal head. It leaves out encoders with such a head,
for example BERT: compileflow refuses them for text generation. Of a model with an encoder and a decoder, such as
Whisper, it holds the decoder alone. `aot-inductor` and `hyperdex` are not part of this sweep.

Regenerate the page with `make architectures`. The sweep keeps its results in `.architectures/` and continues where
it stopped.
"""


def _outcome(line: Mapping[str, Any] | None) -> str:
    if line is None:
        return "not run"
    if line["outcome"] == "fails":
        return "fails" if line["stage"] == "compile" else "wrong"
    return {"works": "yes", "refused": "refused", "transformers": "not built"}[line["outcome"]]


def _summary(cells: Sequence[Sequence[str]]) -> str:
    counts = [Counter(column) for column in zip(*cells, strict=True)]
    rows = [
        (outcome, *(str(count[outcome]) for count in counts))
        for outcome in _OUTCOMES
        if any(count[outcome] for count in counts)
    ]
    return table(("outcome", *(f"`{target}`" for target in DECODER_TARGETS)), rows)


def _reasons(lines: Mapping[ModelClass, Mapping[str, Mapping[str, Any] | None]], outcomes: tuple[str, ...]) -> str:
    """Return one row for each model type and reason."""
    rows = []
    for model_class, by_target in lines.items():
        targets_of: dict[str, list[str]] = {}
        for target, line in by_target.items():
            if line and _outcome(line) in outcomes:
                targets_of.setdefault(line["reason"], []).append(target)
        rows += [(f"`{model_class.model_type}`", ", ".join(targets), why) for why, targets in targets_of.items()]
    return table(("model type", "targets", "reason"), rows) if rows else "None.\n"
