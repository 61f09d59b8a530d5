"""How fast is one pipeline for many clients at once, and does its memory stay flat? JSON on standard output.

python benchmarks/exp_concurrency.py [--model FOLDER] [--target TARGET ...] [--clients N] [--rounds N]
    [--requests N] [--memory-requests N]

In each round, every contestant answers the same sentences twice: as one list, and from N threads that ask for one
sentence at a time. The contestants take turns: pipelines with one thread a call, which run a call for each core,
and with all threads in each call. The table shows the texts per second of both ways, the ratio of the clients to
the list in wall and in processor time (medians over the rounds), and p50 and p99 of the waits. Processor time
does not depend on what else the machine does, as long as no thread spins.

The memory is that of the process after a tenth of the last part's requests and at its end, with one contestant.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.compiled import compiled_pipeline, print_rows, sentences
from compileflow import CompiledPipeline, LightPipeline
from compileflow._process.state import resident_bytes
from compileflow.cli.demo import demo_model
from compileflow.settings import get_settings
from compileflow.validation.report import environment

TARGETS = ("onnx-runtime", "openvino")
KINDS = {"light": LightPipeline, "full": CompiledPipeline}
TASK, GRAPH_TASK = "sentence-similarity", "feature-extraction"
# Limits of the ratios: p99 to p50, throughput of the clients to that of a list, and growth of the memory.
MOST_SPREAD, LEAST_SHARE, MOST_GROWTH = 3.0, 0.9, 0.02


def clients_seconds(embed: Callable[[str], Any], texts: Sequence[str], clients: int) -> list[float]:
    """Let clients ask for one text at a time until all have answers; return the seconds of each request."""

    def ask(text: str) -> float:
        start = time.perf_counter()
        embed(text)
        return time.perf_counter() - start

    with ThreadPoolExecutor(clients) as executor:
        return list(executor.map(ask, texts))


def race(
    pipelines: dict[str, Any], texts: Sequence[str], *, clients: int, rounds: int
) -> dict[str, dict[str, list[Any]]]:
    """Let all contestants answer in turns; return the seconds of each round, by contestant and figure."""
    names = list(pipelines)
    times: dict[str, dict[str, list[Any]]] = {
        name: {"list": [], "list_cpu": [], "clients": [], "clients_cpu": [], "waits": []} for name in names
    }
    for pipeline in pipelines.values():
        pipeline(list(texts[:clients]))
    for number in range(rounds):
        turn = number % len(names)
        for name in (*names[turn:], *names[:turn]):
            pipeline, row = pipelines[name], times[name]
            start, processor = time.perf_counter(), time.process_time()
            pipeline(list(texts))
            row["list"].append(time.perf_counter() - start)
            row["list_cpu"].append(time.process_time() - processor)
            start, processor = time.perf_counter(), time.process_time()
            row["waits"] += clients_seconds(pipeline, texts, clients)
            row["clients"].append(time.perf_counter() - start)
            row["clients_cpu"].append(time.process_time() - processor)
    return times


def summary(row: dict[str, list[Any]], texts: int) -> dict[str, Any]:
    """Return rates, ratios and waits from the seconds of a contestant."""
    seconds = {name: np.array(values) for name, values in row.items()}
    p50, p99 = np.quantile(seconds["waits"], (0.5, 0.99)) * 1e3
    share, share_cpu = (
        float(np.median(seconds[f"list{kind}"] / seconds[f"clients{kind}"])) for kind in ("", "_cpu")
    )
    return {
        "list_texts_per_s": float(texts / np.median(seconds["list"])),
        "clients_texts_per_s": float(texts / np.median(seconds["clients"])),
        "share_of_list": share,
        "share_of_list_in_processor_time": share_cpu,
        "wait_p50_ms": float(p50),
        "wait_p99_ms": float(p99),
        "p99_to_p50": float(p99 / p50),
        "within_limits": bool(p99 <= MOST_SPREAD * p50 and share >= LEAST_SHARE),
    }


def memory_growth(pipeline: Any, texts: Sequence[str], *, clients: int, requests: int) -> dict[str, Any]:
    """Let clients ask again and again; return the memory after a tenth of the requests and at the end."""
    parts = (requests // 10, requests - requests // 10)
    sizes = []
    for count in parts:
        clients_seconds(pipeline, list(islice(cycle(texts), count)), clients)
        sizes.append(resident_bytes())
    growth = sizes[1] / sizes[0] - 1
    return {
        "requests": requests,
        "mb_after_a_tenth": sizes[0] / 2**20,
        "mb_at_the_end": sizes[1] / 2**20,
        "growth": growth,
        "within_limit": bool(abs(growth) <= MOST_GROWTH),
    }


def main() -> None:
    """Compile, race, measure the memory and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a model for feature extraction; default: MiniLM")
    parser.add_argument("--target", action="append", help=f"default: {' '.join(TARGETS)}")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=640, help="texts per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128, help="longest text")
    parser.add_argument("--memory-requests", type=int, default=100_000, help="0: do not measure the memory")
    arguments = parser.parse_args()
    settings = get_settings()
    texts = list(islice(cycle(sentences()), arguments.requests))
    model = arguments.model or demo_model()
    results: dict[str, Any] = {}
    memory: dict[str, Any] = {}
    for target in arguments.target or TARGETS:
        compiled = compiled_pipeline(model, target, GRAPH_TASK, [(8, arguments.tokens)], settings=settings)
        folder = compiled.model.artifact.folder
        compiled.model.close()
        pipelines = {
            f"{target} {kind}, {threads} thread{'s' * (threads > 1)} a call": pipeline_class.from_pretrained(
                folder, task=TASK, threads=threads
            )
            for kind, pipeline_class in KINDS.items()
            for threads in sorted({1, settings.threads})
        }
        times = race(pipelines, texts, clients=arguments.clients, rounds=arguments.rounds)
        results |= {name: summary(row, len(texts)) for name, row in times.items()}
        if arguments.memory_requests:
            name, pipeline = next(iter(pipelines.items()))
            memory[name] = memory_growth(
                pipeline, texts, clients=arguments.clients, requests=arguments.memory_requests
            )
        for pipeline in pipelines.values():
            pipeline.model.close()
    machine = environment(settings.threads)
    print(", ".join(f"{name} {value}" for name, value in machine.items()), file=sys.stderr)
    header = ["list, texts/s", f"{arguments.clients} clients, texts/s", "clients / list", "in processor time"]
    rows = [["contestant", *header, "p50 ms", "p99 ms", "p99 / p50", "within limits"]]
    for name, row in results.items():
        rates = [f"{row[key]:.0f}" for key in ("list_texts_per_s", "clients_texts_per_s")]
        shares = [f"{row[key]:.2f}" for key in ("share_of_list", "share_of_list_in_processor_time")]
        waits = [f"{row['wait_p50_ms']:.0f}", f"{row['wait_p99_ms']:.0f}", f"{row['p99_to_p50']:.2f}"]
        rows.append([name, *rates, *shares, *waits, "yes" if row["within_limits"] else "NO"])
    print_rows(rows)
    for name, row in memory.items():
        print(
            f"memory of {name}: {row['mb_after_a_tenth']:.0f} MB after a tenth of {row['requests']} requests, "
            f"{row['mb_at_the_end']:.0f} MB at the end ({row['growth']:+.2%})",
            file=sys.stderr,
        )
    question = "how many texts per second many clients of one pipeline get, and how long each waits"
    answer = {"question": question, "environment": machine, "results": results, "memory": memory}
    print(json.dumps(answer, indent=1))


if __name__ == "__main__":
    main()
