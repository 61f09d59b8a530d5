"""How long does a list of short sentences take, compared with other ways to run it? JSON on standard output.

python benchmarks/exp_list_calls.py [--model FOLDER] [--target TARGET] [--items N] [--rounds N]

A compiled pipeline runs a list in batches of similar length. The baselines use the same compiled model: one call
per sentence, and transformers' batches of 8, which are not sorted by length. All three take turns, so that other
load on the machine affects each of them. The ratio is the median, over the rounds, of a baseline's time divided by
that of the list call: above 1, the list call is faster.
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

LIST, SINGLE, BATCHES = "list call", "one sentence per call", "transformers' batches of 8"
# Settings of each task's calls; tensors, because nested lists of features take longer than the model.
TASKS: dict[str, dict[str, Any]] = {
    "text-classification": {},
    "feature-extraction": {"return_tensors": True},
}
TOKENS = 64
MAX_WORDS = 20


def short_sentences(count: int) -> list[str]:
    """Return sentences of 3 to 20 words in random order of length; the same ones in every run."""
    random = np.random.default_rng(7)
    source = sentences()
    return [
        " ".join(source[number % len(source)].split()[: random.integers(3, MAX_WORDS + 1)])
        for number in range(count)
    ]


def race(
    pipeline: CompiledPipeline, texts: Sequence[str], settings: dict[str, Any], rounds: int
) -> dict[str, list[float]]:
    """Run the list in all three ways in turn; return the seconds of each round."""
    items = list(texts)
    calls: dict[str, Callable[[], Any]] = {
        LIST: lambda: pipeline(items, **settings),
        SINGLE: lambda: [pipeline(item, **settings) for item in items],
        BATCHES: lambda: pipeline.pipeline(items, batch_size=8, **settings),
    }
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    pipeline(items[:100], **settings)
    for number in range(rounds):
        # The first contestant changes every round.
        turn = number % len(names)
        for name in (*names[turn:], *names[:turn]):
            start = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - start)
    return times


def summary(times: dict[str, list[float]], count: int) -> dict[str, dict[str, Any]]:
    """Return sentences per second of each way, and the ratio of its time to that of the list call."""
    rows = {}
    for name, seconds in times.items():
        ratios = np.asarray(seconds) / np.asarray(times[LIST])
        rows[name] = {
            "sentences_per_s": float(count / np.median(seconds)),
            "ratio": float(np.median(ratios)),
            "ratio_quartiles": [float(quartile) for quartile in np.quantile(ratios, (0.25, 0.75))],
        }
    return rows


def main() -> None:
    """Compile, race and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a model for feature extraction; default: MiniLM")
    parser.add_argument("--target", default="onnx-runtime")
    parser.add_argument("--items", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    import torch

    settings = get_settings()
    torch.set_num_threads(settings.threads)
    texts = short_sentences(arguments.items)
    body = arguments.model or demo_model()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        models = {"text-classification": with_classifier(body, Path(folder)), "feature-extraction": body}
        for task, call_settings in TASKS.items():
            pipeline = compiled_pipeline(models[task], arguments.target, task, [(8, TOKENS)], settings=settings)
            rows = summary(race(pipeline, texts, call_settings, arguments.rounds), len(texts))
            results |= {f"{task} {arguments.target}, {name}": row for name, row in rows.items()}
            pipeline.model.close()
    machine = environment(settings.threads)
    print(", ".join(f"{name} {value}" for name, value in machine.items()), file=sys.stderr)
    table = [[f"{len(texts)} sentences", "sentences/s", "time / list call", "quartiles"]]
    for name, row in results.items():
        low, high = row["ratio_quartiles"]
        table.append([name, f"{row['sentences_per_s']:.0f}", f"{row['ratio']:.2f}", f"{low:.2f} to {high:.2f}"])
    print_rows(table)
    question = "time of a way to run a list of short sentences, divided by the time of the list call"
    print(json.dumps({"question": question, "environment": machine, "results": results}, indent=1))


if __name__ == "__main__":
    main()
