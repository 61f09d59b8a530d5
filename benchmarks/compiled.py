"""Shared by the benchmarks: models, compiled pipelines from the local store, sentences, and tables."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from compileflow import CompiledPipeline
from compileflow.settings import Settings
from compileflow.spec import HfTask
from compileflow.steps.compile import compile_artifact
from compileflow.steps.fetch import fetch_source
from compileflow.steps.request import CompileRequest
from compileflow.validation.cases import load_examples


def compiled_pipeline(
    model: Path,
    target: str,
    hf_task: str,
    shapes: Sequence[tuple[int, int]],
    *,
    settings: Settings,
    precision: str = "fp32",
) -> CompiledPipeline:
    """Compile a model as `compiled_uri` does, and load it with the threads of the settings."""
    uri = compiled_uri(model, target, hf_task, shapes, settings=settings, precision=precision)
    return CompiledPipeline.from_pretrained(uri, threads=settings.threads)


def compiled_uri(
    model: Path,
    target: str,
    hf_task: str,
    shapes: Sequence[tuple[int, int]],
    *,
    settings: Settings,
    precision: str = "fp32",
) -> str:
    """Compile a model, or reuse the artifact of an earlier run, and return the URI of the artifact.

    Args:
        model: Folder of a source model.
        target: Name of a target.
        hf_task: Task to compile for.
        shapes: (batch_size, sequence_length) of each bucket; the longest is the maximum of a dynamic component.
        settings: Settings with the store and the threads.
        precision: Precision of the compiled model.
    """
    store_uri = settings.resolved_store_uri()
    source = fetch_source(str(model), None, store_uri=store_uri, settings=settings)
    request = CompileRequest.model_validate(
        {
            "model": str(model),
            "target": target,
            "hf_task": hf_task,
            "precision": precision,
            "shape_buckets": [{"batch_size": rows, "sequence_length": length} for rows, length in shapes],
        }
    )
    print(f"compiling for {target} {precision}", file=sys.stderr)
    return compile_artifact(
        source, request, store_uri=store_uri, settings=settings, on_progress=lambda line: None
    ).uri


def with_classifier(body: Path, folder: Path) -> Path:
    """Write a classifier that has the weights of a model below a random head."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(body, num_labels=3).save_pretrained(folder)
    AutoTokenizer.from_pretrained(body).save_pretrained(folder)
    return folder


def sentences() -> list[str]:
    """Return the natural sentences of the library."""
    examples, _, _ = load_examples(HfTask.FEATURE_EXTRACTION, None, sys.maxsize)
    return [example["text"] for example in examples]


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Return a table as Markdown, header first, with an empty line after it."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:], ""])


def print_rows(rows: Sequence[Sequence[str]]) -> None:
    """Print a table, header first, on standard error, because standard output is for the JSON."""
    for number, row in enumerate(rows):
        print(f"| {' | '.join(row)} |", file=sys.stderr)
        if number == 0:
            print(f"|{'---|' * len(row)}", file=sys.stderr)
