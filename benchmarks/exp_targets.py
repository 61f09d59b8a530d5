"""Speed, size and compile time of each target at each precision. JSON on standard output.

python benchmarks/exp_targets.py [--model minilm|bert-base|FOLDER] [--shape BxT ...] [--among TARGET ...]

Eager PyTorch in fp32, torch.compile and every compiled model take turns in one process. The speedup is the median,
over the rounds, of eager's time divided by a contestant's time in the same round: above 1 is faster than eager.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from compileflow.catalog import target_names
from compileflow.cli.demo import demo_model
from compileflow.errors import CompileflowError
from compileflow.selection.auto import plan_candidates
from compileflow.serving.model import CompiledModel
from compileflow.settings import get_settings
from compileflow.source_model.interface import SourceModel
from compileflow.source_model.load import load_source_model
from compileflow.steps.compile import compile_artifact, detect_task
from compileflow.steps.fetch import fetch_source
from compileflow.steps.request import AUTO, CompileRequest
from compileflow.steps.values import CompiledArtifact
from compileflow.validation.report import environment

SHAPES = ("1x16", "1x128", "8x128", "32x128")
# A call shorter than this may still meet spinning threads of another library, so it gets a second warm-up call.
SHORT_S = 0.1
PAUSE_S = 0.03


@dataclass
class Contestant:
    """One model in the race: its name, the function that runs it, and the cost of its compile."""

    name: str
    call: Callable[[dict[str, Any]], object]
    cost: dict[str, Any]


def bert_base(folder: Path) -> Path:
    """Write a BERT-base classifier with random weights and the tokenizer of MiniLM."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(demo_model(), local_files_only=True)
    BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def contestants(model: Path, shapes: Sequence[tuple[int, int]], among: Sequence[str]) -> list[Contestant]:
    """Compile, or take from the cache, for every target and precision that can run here."""
    settings = get_settings()
    store_uri = settings.resolved_store_uri()
    source = fetch_source(str(model), None, store_uri=store_uri, settings=settings)
    buckets = [{"batch_size": batch_size, "sequence_length": length} for batch_size, length in shapes]
    fields = {"model": str(model), "target": AUTO, "auto": {"targets": among}, "shape_buckets": buckets}
    plan = plan_candidates(source, CompileRequest.model_validate(fields), store_uri=store_uri, settings=settings)
    for candidate in plan.unavailable:
        print(f"left out: {candidate.label}: {candidate.reason}", file=sys.stderr)
    racers = []
    for request in plan.requests:
        options = "".join(f" {name}={value}" for name, value in request.target_options.items())
        name = f"{request.target} {request.precision.value}{options}"
        print(f"compiling {name}", file=sys.stderr)
        try:
            artifact = compile_artifact(
                source, request, store_uri=store_uri, settings=settings, on_progress=lambda line: None
            )
            compiled = CompiledModel.from_pretrained(artifact.uri, threads=settings.threads)
        except CompileflowError as error:
            print(f"left out: {name}: {error}", file=sys.stderr)
            continue
        racers.append(Contestant(name, compiled.run, cost_of(artifact)))
    return racers


def cost_of(artifact: CompiledArtifact) -> dict[str, Any]:
    """Return the cost of a compile, measured when the artifact was compiled."""
    return {
        "compile_duration_s": artifact.compile_duration_s,
        "peak_rss_bytes": artifact.peak_rss_bytes,
        "size_bytes": artifact.size_bytes,
    }


def torch_compile(source_model: SourceModel) -> Contestant:
    """Return the contestant that compiles at run time, once per shape."""
    import torch

    compiled = torch.compile(source_model.model)

    def call(inputs: dict[str, Any]) -> object:
        with torch.inference_mode():
            return compiled(**{name: torch.as_tensor(value) for name, value in inputs.items()})

    return Contestant("torch.compile", call, {})


def race(
    inputs: dict[str, Any], racers: Sequence[Contestant], *, rounds: int, budget_s: float
) -> dict[str, list[float]]:
    """Run all contestants in turns for at least three rounds; return the seconds of each round."""
    times: dict[str, list[float]] = {racer.name: [] for racer in racers}
    warm = {}
    for racer in racers:
        racer.call(inputs)
        racer.call(inputs)
        start = time.perf_counter()
        racer.call(inputs)
        warm[racer.name] = 2 if time.perf_counter() - start < SHORT_S else 1
    end = time.perf_counter() + budget_s
    for number in range(rounds):
        if number >= 3 and time.perf_counter() > end:
            break
        # The first contestant changes every round.
        turn = number % len(racers)
        for racer in (*racers[turn:], *racers[:turn]):
            # Long enough for the spinning threads of the previous contestant to go to sleep.
            time.sleep(PAUSE_S)
            for _ in range(warm[racer.name]):
                racer.call(inputs)
            start = time.perf_counter()
            racer.call(inputs)
            times[racer.name].append(time.perf_counter() - start)
    return times


def print_table(rows: dict[str, Any], shapes: Sequence[str]) -> None:
    """Print the results as a table on standard error."""
    header = ["times as fast as eager", *shapes, "compile s", "peak MB", "size MB"]
    lines = [header]
    for name, row in rows.items():
        speeds = [f"{row['shapes'][shape]['speedup']:.2f}" for shape in shapes]
        if name == "eager fp32":
            speeds = [f"{row['shapes'][shape]['p50_ms']:.1f} ms" for shape in shapes]
        cost = row["cost"]
        lines.append(
            [
                name,
                *speeds,
                f"{cost['compile_duration_s']:.0f}" if cost else "",
                f"{cost['peak_rss_bytes'] / 1e6:.0f}" if cost else "",
                f"{cost['size_bytes'] / 1e6:.0f}" if cost else "",
            ]
        )
    for line in lines:
        print(f"| {' | '.join(line)} |", file=sys.stderr)


def main() -> None:
    """Compile, race and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm", help="minilm, bert-base (random weights), or a folder")
    parser.add_argument("--shape", action="append", help=f"BATCHxTOKENS; default: {' '.join(SHAPES)}")
    parser.add_argument("--among", action="append", default=[], help=f"a target: {', '.join(target_names())}")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--budget-s", type=float, default=60.0, help="seconds per shape, after three rounds")
    arguments = parser.parse_args()
    shapes = [tuple(int(size) for size in text.split("x")) for text in arguments.shape or SHAPES]
    import torch

    settings = get_settings()
    torch.set_num_threads(settings.threads)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model == "minilm":
            model = demo_model()
        elif arguments.model == "bert-base":
            model = bert_base(Path(folder) / "bert-base")
        else:
            model = Path(arguments.model)
        source_model = load_source_model(model, detect_task(model))
        racers = [
            Contestant("eager fp32", source_model.run, {}),
            torch_compile(source_model),
            *contestants(model, shapes, arguments.among),
        ]
    random = np.random.default_rng(1)
    rows: dict[str, Any] = {racer.name: {"shapes": {}, "cost": racer.cost} for racer in racers}
    names = []
    for batch_size, length in shapes:
        names.append(f"{batch_size}x{length}")
        print(f"racing at {names[-1]}", file=sys.stderr)
        ids = random.integers(0, source_model.vocab_size, (batch_size, length))
        inputs = {record.name: np.zeros_like(ids) for record in source_model.inputs}
        inputs |= {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        times = race(inputs, racers, rounds=arguments.rounds, budget_s=arguments.budget_s)
        for name, seconds in times.items():
            speedups = np.asarray(times["eager fp32"]) / np.asarray(seconds)
            rows[name]["shapes"][names[-1]] = {
                "p50_ms": float(np.median(seconds) * 1e3),
                "speedup": float(np.median(speedups)),
                "speedup_quartiles": [float(quartile) for quartile in np.quantile(speedups, (0.25, 0.75))],
                "rounds": len(seconds),
            }
    print_table(rows, names)
    answer = {
        "question": "times as fast as eager PyTorch fp32, median over rounds; compile time, peak memory, size",
        "model": arguments.model,
        "environment": environment(settings.threads),
        "results": rows,
    }
    print(json.dumps(answer, indent=1))


if __name__ == "__main__":
    main()
