"""What the benchmarks share: compiled pipelines out of the local store, sentences, and tables for people."""

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
    """Compile a model, or take it from the store of an earlier run, and load it with the settings' threads.

    Args:
        model: Folder of a source model.
        target: A target's name.
        hf_task: Task to compile for.
        shapes: (batch_size, sequence_length) of each bucket; a dynamic graph takes the longest as its maximum.
        settings: Store and threads.
        precision: Of the graph.
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
    artifact = compile_artifact(
        source, request, store_uri=store_uri, settings=settings, on_progress=lambda line: None
    )
    return CompiledPipeline.from_pretrained(artifact.uri, threads=settings.threads)


def sentences() -> list[str]:
    """Return the natural sentences that the library carries."""
    examples, _, _ = load_examples(HfTask.FEATURE_EXTRACTION, None, sys.maxsize)
    return [example["text"] for example in examples]


def print_rows(rows: Sequence[Sequence[str]]) -> None:
    """Print a table, its header first, on standard error: standard output is the JSON's."""
    for number, row in enumerate(rows):
        print(f"| {' | '.join(row)} |", file=sys.stderr)
        if number == 0:
            print(f"|{'---|' * len(row)}", file=sys.stderr)
