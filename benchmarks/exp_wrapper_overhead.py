"""What does CompiledPipeline cost on top of its runtime? One text of 16 tokens a call. JSON on standard output.

python benchmarks/exp_wrapper_overhead.py [--model FOLDER] [--target TARGET ...] [--blocks N] [--calls N]

The other side is the least that a service could do by hand: the same call of the tokenizer, and the same runtime
session called with its arrays. Both take turns in one process, call by call. A block's ratio is that of its two
medians; what is printed is the median of the blocks' ratios and their quartiles.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.compiled import compiled_pipeline, print_rows, sentences
from compileflow import CompiledPipeline
from compileflow.settings import get_settings
from compileflow.validation.report import environment
from compileflow.cli.demo import demo_model

TASKS = ("text-classification", "feature-extraction")
TARGETS = ("onnx-runtime", "openvino", "torchscript")
TOKENS = 16
# A wrapper that takes longer than this, compared with the bare runtime, is a fault.
LIMIT = 1.15


def with_classifier(body: Path, folder: Path) -> Path:
    """Write a classifier of the body's weights under a random head."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(body, num_labels=3).save_pretrained(folder)
    AutoTokenizer.from_pretrained(body).save_pretrained(folder)
    return folder


def texts_of(tokenizer: Any, tokens: int, count: int = 20) -> list[str]:
    """Return sentences that have exactly so many tokens."""
    found = [text for text in sentences() if len(tokenizer(text)["input_ids"]) == tokens]
    if not found:
        raise SystemExit(f"No sentence has {tokens} tokens.")
    return found[:count]


def bare_call(pipeline: CompiledPipeline) -> Callable[[str], Any]:
    """Return tokenizer and runtime session without anything around them: the pipeline's own, not second ones.

    A second session's threads would fight with the first one's.
    """
    graph = pipeline.model.graph
    runner, names = graph._runner, [record.name for record in graph.record.inputs]
    tokenizer = pipeline.tokenizer
    target = graph.artifact.manifest.target.name
    if target == "onnx-runtime":
        session = runner._session
        taken = {value.name for value in session.get_inputs()}
        return lambda text: session.run(
            None, {name: value for name, value in tokenizer(text, return_tensors="np").items() if name in taken}
        )
    if target == "openvino":
        request = runner._model.create_infer_request()
        return lambda text: request.infer(dict(tokenizer(text, return_tensors="np")))
    import torch

    traced = runner._graphs[(1, TOKENS)]

    def call(text: str) -> Any:
        encoded = tokenizer(text, return_tensors="np")
        with torch.inference_mode():
            return traced(*(torch.from_numpy(encoded[name]) for name in names))

    return call


def race(pipeline: CompiledPipeline, texts: Sequence[str], *, blocks: int, calls: int) -> dict[str, Any]:
    """Let pipeline and bare runtime take turns; return milliseconds, and the ratio with its quartiles."""
    bare = bare_call(pipeline)
    for text in texts:
        pipeline(text)
        bare(text)
    times = np.empty((blocks, calls, 2))
    for block in range(blocks):
        for number in range(calls):
            text = texts[number % len(texts)]
            # Who goes first changes every turn.
            for side in (0, 1) if number % 2 else (1, 0):
                call = bare if side else pipeline
                start = time.perf_counter()
                call(text)
                times[block, number, side] = time.perf_counter() - start
    medians = np.median(times, axis=1)
    ratios = medians[:, 0] / medians[:, 1]
    return {
        "pipeline_p50_ms": float(np.median(times[..., 0]) * 1e3),
        "bare_p50_ms": float(np.median(times[..., 1]) * 1e3),
        "ratio": float(np.median(ratios)),
        "ratio_quartiles": [float(each) for each in np.quantile(ratios, (0.25, 0.75))],
        "within_limit": bool(np.median(ratios) <= LIMIT),
    }


def main() -> None:
    """Compile, race and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a body for feature extraction; default: MiniLM")
    parser.add_argument("--target", action="append", help=f"default: {' '.join(TARGETS)}")
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--calls", type=int, default=100, help="of each side, a block")
    given = parser.parse_args()
    import torch

    settings = get_settings()
    torch.set_num_threads(settings.threads)
    body = given.model or demo_model()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        models = {"text-classification": with_classifier(body, Path(folder)), "feature-extraction": body}
        for task in TASKS:
            for target in given.target or TARGETS:
                pipeline = compiled_pipeline(models[task], target, task, [(1, TOKENS)], settings=settings)
                texts = texts_of(pipeline.tokenizer.tokenizer, TOKENS)
                results[f"{task} {target}"] = race(pipeline, texts, blocks=given.blocks, calls=given.calls)
                pipeline.model.close()
    machine = environment(settings.threads)
    print(", ".join(f"{name} {value}" for name, value in machine.items()), file=sys.stderr)
    rows = [["1 text of 16 tokens", "pipeline p50 ms", "bare p50 ms", "ratio", "quartiles", f"at most {LIMIT}"]]
    for name, row in results.items():
        low, high = row["ratio_quartiles"]
        times = (f"{row['pipeline_p50_ms']:.3f}", f"{row['bare_p50_ms']:.3f}", f"{row['ratio']:.3f}")
        rows.append([name, *times, f"{low:.3f} to {high:.3f}", "yes" if row["within_limit"] else "NO"])
    print_rows(rows)
    question = (
        "CompiledPipeline's time over that of its tokenizer and runtime session alone, one text of 16 tokens"
    )
    print(json.dumps({"question": question, "environment": machine, "results": results}, indent=1))


if __name__ == "__main__":
    main()
