"""How many sentences per second, one at a time, does each compiled MiniLM embed? JSON on standard output.

python benchmarks/exp_text_stream.py [--sentences N] [--threads N] [--among TARGET ...]

The stream has natural sentences of all lengths. All contestants embed the same blocks of it in turn, in one
process, so that other load on the machine affects each of them. The table shows sentences per second, latencies,
and the speedup: the median, over the blocks, of the time of TorchScript padded to 128 tokens divided by that of
the contestant.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.compiled import compiled_pipeline, print_rows, sentences
from compileflow.catalog import get_target, target_names
from compileflow.cli.demo import demo_model
from compileflow.settings import Settings, get_settings
from compileflow.spec import HfTask
from compileflow.validation.report import environment

PADDED, EAGER = "torchscript padded", "eager transformers"
BUCKETS = (8, 16, 24, 32, 48, 64, 96, 128)
# Log-normal lengths, which resemble those of natural sentences.
MEDIAN_TOKENS, SPREAD = 16, 0.6
BLOCK = 25
# Long enough for the spinning threads of the previous contestant to go to sleep.
PAUSE_S = 0.03
# Smallest accepted speedup of the fastest contestant over TorchScript padded to 128.
LIMIT = 6.0


def stream(
    tokenizer: Any, count: int, longest: int, *, median: int = MEDIAN_TOKENS, spread: float = SPREAD
) -> list[str]:
    """Return sentences, cut or joined at spaces to random lengths; the same ones in every run."""
    random = np.random.default_rng(16)
    lengths = np.clip(np.exp(random.normal(np.log(median), spread, count)), 4, longest).round()
    source = sentences()
    texts = []
    for number, length in enumerate(lengths):
        words: list[str] = []
        following = number
        while len(tokenizer(" ".join(words))["input_ids"]) < length:
            words += source[following % len(source)].split()
            following += 1
        while len(words) > 1 and len(tokenizer(" ".join(words))["input_ids"]) > length:
            words.pop()
        texts.append(" ".join(words))
    return texts


def contestants(
    model: Path, among: Sequence[str], longest: int, settings: Settings
) -> dict[str, Callable[[str], Any]]:
    """Compile, or take from the store, for every target that can run here."""
    from transformers import pipeline

    task = HfTask.FEATURE_EXTRACTION.value
    loading = {"settings": settings}
    pipelines: dict[str, Callable[[str], Any]] = {
        EAGER: pipeline(task, model=str(model), device="cpu"),
        PADDED: compiled_pipeline(model, "torchscript", task, [(1, longest)], **loading),
    }
    for name in among or ("torchscript", "onnx-runtime", "openvino"):
        target = get_target(name)
        lengths = [] if target.capabilities.dynamic_axes else [bucket for bucket in BUCKETS if bucket < longest]
        shapes = [(1, length) for length in (*lengths, longest)]
        for precision in ("fp32", "int8"):
            if precision not in target.capabilities.precisions:
                continue
            if not target.probe().can_compile:
                print(f"left out: {name}: {target.probe().reason}", file=sys.stderr)
                continue
            label = f"{name} {precision}" + (f", {len(shapes)} buckets" if lengths else "")
            pipelines[label] = compiled_pipeline(model, name, task, shapes, precision=precision, **loading)
    return pipelines


def race(texts: Sequence[str], racers: dict[str, Callable[[str], Any]]) -> dict[str, list[list[float]]]:
    """Let all contestants embed each block in turn; return their seconds per text, block by block."""
    names = list(racers)
    times: dict[str, list[list[float]]] = {name: [] for name in names}
    ordered = sorted(texts, key=len)
    for call in racers.values():
        # All lengths, because each bucket is a graph; twice, because TorchScript optimises in the second call.
        for text in 2 * [*ordered[:: max(1, len(ordered) // 40)], ordered[-1]]:
            call(text)
    for number, start in enumerate(range(0, len(texts), BLOCK)):
        block = texts[start : start + BLOCK]
        # The first contestant changes every block.
        turn = number % len(names)
        for name in (*names[turn:], *names[:turn]):
            call = racers[name]
            time.sleep(PAUSE_S)
            call(block[0])
            seconds = []
            for text in block:
                began = time.perf_counter()
                call(text)
                seconds.append(time.perf_counter() - began)
            times[name].append(seconds)
    return times


def summary(times: dict[str, list[list[float]]]) -> dict[str, dict[str, Any]]:
    """Return rates, latencies and speedups from the times."""
    padded = np.array([sum(block) for block in times[PADDED]])
    rows = {}
    for name, blocks in times.items():
        seconds = np.concatenate(blocks)
        ratios = padded / np.array([sum(block) for block in blocks])
        rows[name] = {
            "sentences_per_s": float(len(seconds) / seconds.sum()),
            "latency_p50_ms": float(np.quantile(seconds, 0.5) * 1e3),
            "latency_p99_ms": float(np.quantile(seconds, 0.99) * 1e3),
            "times_as_fast_as_padded": float(np.median(ratios)),
            "times_as_fast_quartiles": [float(quartile) for quartile in np.quantile(ratios, (0.25, 0.75))],
        }
    return rows


def main() -> None:
    """Compile, race and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=int, default=1000)
    parser.add_argument("--threads", type=int, help="default: COMPILEFLOW_THREADS")
    parser.add_argument("--among", action="append", default=[], help=f"a target: {', '.join(target_names())}")
    parser.add_argument("--model", type=Path, help="folder of another model for feature extraction")
    parser.add_argument("--tokens", type=int, default=128, help="length that the padded contestant is padded to")
    arguments = parser.parse_args()
    import torch

    settings = get_settings()
    if arguments.threads is not None:
        settings = settings.model_copy(update={"threads": arguments.threads})
    torch.set_num_threads(settings.threads)
    racers = contestants(arguments.model or demo_model(), arguments.among, arguments.tokens, settings)
    tokenizer = racers[EAGER].tokenizer
    texts = stream(tokenizer, arguments.sentences, arguments.tokens)
    lengths = [len(tokenizer(text)["input_ids"]) for text in texts]
    parts = {f"p{part}": int(np.percentile(lengths, part)) for part in (0, 10, 25, 50, 75, 90, 99, 100)}
    rows = summary(race(texts, racers))
    best = max(rows, key=lambda name: rows[name]["times_as_fast_as_padded"])
    machine = environment(settings.threads)
    print(", ".join(f"{name} {value}" for name, value in machine.items()), file=sys.stderr)
    print(f"{len(texts)} sentences, tokens: {', '.join(f'{k} {v}' for k, v in parts.items())}", file=sys.stderr)
    table = [["one sentence at a time", "sentences/s", "p50 ms", "p99 ms", "times as fast as padded", "quartiles"]]
    for name, row in sorted(rows.items(), key=lambda item: item[1]["times_as_fast_as_padded"]):
        figures = [f"{row[key]:.2f}" for key in ("latency_p50_ms", "latency_p99_ms", "times_as_fast_as_padded")]
        low, high = row["times_as_fast_quartiles"]
        table.append([name, f"{row['sentences_per_s']:.0f}", *figures, f"{low:.2f} to {high:.2f}"])
    print_rows(table)
    reached = rows[best]["times_as_fast_as_padded"] >= LIMIT
    print(f"best: {best}; at least {LIMIT} times as fast: {'yes' if reached else 'NO'}", file=sys.stderr)
    answer = {
        "question": "times as fast as TorchScript padded to the longest, natural sentences one at a time",
        "padded_to": arguments.tokens,
        "environment": machine,
        "tokens": parts,
        "best": best,
        "within_limit": reached,
        "results": rows,
    }
    print(json.dumps(answer, indent=1))


if __name__ == "__main__":
    main()
