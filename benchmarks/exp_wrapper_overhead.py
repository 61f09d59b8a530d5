"""How much time does CompiledPipeline add to its runtime for one text of 16 tokens? JSON on standard output.

python benchmarks/exp_wrapper_overhead.py [--model FOLDER] [--target TARGET ...] [--blocks N] [--calls N]

The baseline is the least that a service could do by hand: call the same tokenizer, and the same runtime session
with its arrays. Both take turns in one process, call by call. The ratio of a block is that of its two medians; the
table shows the median and quartiles of the blocks' ratios.
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

from benchmarks.compiled import compiled_pipeline, print_rows, sentences, with_classifier
from compileflow import CompiledPipeline
from compileflow.cli.demo import demo_model
from compileflow.settings import get_settings
from compileflow.validation.report import environment

TASKS = ("text-classification", "feature-extraction")
TARGETS = ("onnx-runtime", "openvino", "torchscript")
TOKENS = 16
# Largest accepted ratio of the pipeline's time to that of the bare runtime.
LIMIT = 1.15


def texts_of(tokenizer: Any, tokens: int, count: int = 20) -> list[str]:
    """Return up to `count` sentences of exactly `tokens` tokens."""
    texts = [text for text in sentences() if len(tokenizer(text)["input_ids"]) == tokens]
    if not texts:
        raise SystemExit(f"No sentence has {tokens} tokens.")
    return texts[:count]


def bare_call(pipeline: CompiledPipeline) -> Callable[[str], Any]:
    """Return a call of the pipeline's tokenizer and runtime session alone.

    A second session is not an option, because its threads would compete with those of the first.
    """
    component = pipeline.model.graph
    runner, names = component._runner, [record.name for record in component.record.inputs]
    tokenizer = pipeline.tokenizer
    target = component.artifact.manifest.target.name
    if target == "onnx-runtime":
        session = runner._session
        input_names = {value.name for value in session.get_inputs()}
        return lambda text: session.run(
            None,
            {name: value for name, value in tokenizer(text, return_tensors="np").items() if name in input_names},
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
    """Run the pipeline and the bare runtime in turns; return milliseconds, and the ratio with its quartiles."""
    bare = bare_call(pipeline)
    for text in texts:
        pipeline(text)
        bare(text)
    times = np.empty((blocks, calls, 2))
    for block in range(blocks):
        for number in range(calls):
            text = texts[number % len(texts)]
            # The order changes every turn.
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
        "ratio_quartiles": [float(quartile) for quartile in np.quantile(ratios, (0.25, 0.75))],
        "within_limit": bool(np.median(ratios) <= LIMIT),
    }


def main() -> None:
    """Compile, race and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a model for feature extraction; default: MiniLM")
    parser.add_argument("--target", action="append", help=f"default: {' '.join(TARGETS)}")
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--calls", type=int, default=100, help="calls of each side per block")
    arguments = parser.parse_args()
    import torch

    settings = get_settings()
    torch.set_num_threads(settings.threads)
    body = arguments.model or demo_model()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        models = {"text-classification": with_classifier(body, Path(folder)), "feature-extraction": body}
        for task in TASKS:
            for target in arguments.target or TARGETS:
                pipeline = compiled_pipeline(models[task], target, task, [(1, TOKENS)], settings=settings)
                texts = texts_of(pipeline.tokenizer.tokenizer, TOKENS)
                results[f"{task} {target}"] = race(pipeline, texts, blocks=arguments.blocks, calls=arguments.calls)
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
