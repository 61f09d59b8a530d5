"""How much time do the pipelines add to their runtime for one text of 16 tokens? JSON on standard output.

python benchmarks/exp_wrapper_overhead.py [--model FOLDER] [--target TARGET ...] [--blocks N] [--calls N]

The baseline is the least that a service could do by hand: call a tokenizer, and the same runtime session with its
arrays. For CompiledPipeline, the tokenizer is that of transformers, for LightPipeline the package tokenizers. Both
take turns in one process, call by call. A block has the ratio of its two medians. The table shows the median and
quartiles of the ratios, and the median ratio of processor times, which other load affects less.
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
from compileflow import CompiledPipeline, LightPipeline
from compileflow.cli.demo import demo_model
from compileflow.settings import get_settings
from compileflow.validation.report import environment

# The task that is served, and the one that the model is compiled for.
TASKS = {
    "text-classification": "text-classification",
    "feature-extraction": "feature-extraction",
    "sentence-similarity": "feature-extraction",
}
TARGETS = ("onnx-runtime", "openvino", "torchscript")
TOKENS = 16
# Largest accepted ratio of the pipeline's time to that of the bare runtime.
LIMIT = 1.05


def texts_of(tokenizer: Any, tokens: int, count: int = 20) -> list[str]:
    """Return up to `count` sentences of exactly `tokens` tokens."""
    texts = [text for text in sentences() if len(tokenizer(text)["input_ids"]) == tokens]
    if not texts:
        raise SystemExit(f"No sentence has {tokens} tokens.")
    return texts[:count]


def arrays_of(pipeline: Any, names: Sequence[str]) -> Callable[[str], dict[str, Any]]:
    """Return a call of the pipeline's tokenizer that gives the arrays of a session."""
    if isinstance(pipeline, CompiledPipeline):
        return lambda text: dict(pipeline.tokenizer(text, return_tensors="np"))
    encode = pipeline.tokenizer.backend_tokenizer.encode
    fields = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}

    def arrays(text: str) -> dict[str, Any]:
        encoding = encode(text)
        return {name: np.array([getattr(encoding, fields[name])]) for name in names}

    return arrays


def bare_call(pipeline: Any) -> Callable[[str], Any]:
    """Return a call of the pipeline's tokenizer and runtime session alone.

    A second session is not an option, because its threads would compete with those of the first.
    """
    component = pipeline.model.graph
    runner, names = component._runner, [record.name for record in component.record.inputs]
    tokenized = arrays_of(pipeline, names)
    target = component.artifact.manifest.target.name
    if target == "onnx-runtime":
        session = runner._session
        input_names = {value.name for value in session.get_inputs()}
        return lambda text: session.run(
            None,
            {name: value for name, value in tokenized(text).items() if name in input_names},
        )
    if target == "openvino":
        request = runner._model.create_infer_request()
        return lambda text: request.infer(tokenized(text), share_inputs=True)
    import torch

    traced = runner._graphs[(1, TOKENS)]

    def call(text: str) -> Any:
        encoded = tokenized(text)
        with torch.inference_mode():
            return traced(*(torch.from_numpy(encoded[name]) for name in names))

    return call


def race(pipeline: Any, texts: Sequence[str], *, blocks: int, calls: int) -> dict[str, Any]:
    """Run the pipeline and the bare runtime in turns; return milliseconds, and the ratio with its quartiles."""
    bare = bare_call(pipeline)
    for text in texts:
        pipeline(text)
        bare(text)
    times, processor_times = np.empty((blocks, calls, 2)), np.empty((blocks, calls, 2))
    for block in range(blocks):
        for number in range(calls):
            text = texts[number % len(texts)]
            # The order changes every turn.
            for side in (0, 1) if number % 2 else (1, 0):
                call = bare if side else pipeline
                start, processor_start = time.perf_counter(), time.process_time()
                call(text)
                times[block, number, side] = time.perf_counter() - start
                processor_times[block, number, side] = time.process_time() - processor_start
    ratios, processor_ratios = (
        np.median(values[..., 0], axis=1) / np.median(values[..., 1], axis=1)
        for values in (times, processor_times)
    )
    return {
        "pipeline_p50_ms": float(np.median(times[..., 0]) * 1e3),
        "bare_p50_ms": float(np.median(times[..., 1]) * 1e3),
        "ratio": float(np.median(ratios)),
        "ratio_quartiles": [float(quartile) for quartile in np.quantile(ratios, (0.25, 0.75))],
        "processor_time_ratio": float(np.median(processor_ratios)),
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
        for task, graph_task in TASKS.items():
            for target in arguments.target or TARGETS:
                full = compiled_pipeline(models[graph_task], target, graph_task, [(1, TOKENS)], settings=settings)
                texts = texts_of(full.tokenizer.tokenizer, TOKENS)
                pipelines = {
                    "full": CompiledPipeline.from_model(full.model, task=task),
                    "light": LightPipeline.from_component(full.model.graph, task=task),
                }
                for kind, pipeline in pipelines.items():
                    results[f"{task} {target} {kind}"] = race(
                        pipeline, texts, blocks=arguments.blocks, calls=arguments.calls
                    )
                full.model.close()
    machine = environment(settings.threads)
    print(", ".join(f"{name} {value}" for name, value in machine.items()), file=sys.stderr)
    rows = [
        [
            "1 text of 16 tokens",
            "pipeline p50 ms",
            "bare p50 ms",
            "ratio",
            "quartiles",
            "in processor time",
            f"at most {LIMIT}",
        ]
    ]
    for name, row in results.items():
        low, high = row["ratio_quartiles"]
        times = (f"{row['pipeline_p50_ms']:.3f}", f"{row['bare_p50_ms']:.3f}", f"{row['ratio']:.3f}")
        rows.append(
            [
                name,
                *times,
                f"{low:.3f} to {high:.3f}",
                f"{row['processor_time_ratio']:.3f}",
                "yes" if row["within_limit"] else "NO",
            ]
        )
    print_rows(rows)
    question = "a pipeline's time over that of its tokenizer and runtime session alone, one text of 16 tokens"
    print(json.dumps({"question": question, "environment": machine, "results": results}, indent=1))


if __name__ == "__main__":
    main()
