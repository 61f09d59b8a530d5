"""How fast is each target against eager PyTorch? Calls in turn, in one process; JSON on standard output.

python benchmarks/exp_targets_against_eager.py [--model FOLDER] [--pairs N]
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from compileflow.catalog import get_target, target_names
from compileflow.serving.model import CompiledModel
from compileflow.settings import get_settings
from compileflow.source_graph import load_source_graph
from compileflow.steps.compile import compile_artifact, detect_task
from compileflow.steps.fetch import fetch_source
from compileflow.steps.request import CompileRequest
from compileflow.validation.latency import Latency, time_pairs
from compileflow.validation.report import environment
from flows.demo import demo_model

SHAPES = ((1, 16), (1, 128), (8, 64))


def compiled(model: Path, target: str) -> CompiledModel:
    """Compile, or take from the cache, and load."""
    settings = get_settings()
    store_uri = settings.resolved_store_uri()
    source = fetch_source(str(model), None, store_uri=store_uri, settings=settings)
    request = CompileRequest(model=str(model), target=target)
    artifact = compile_artifact(
        source,
        request,
        store_uri=store_uri,
        settings=settings,
        on_progress=lambda line: print(line, file=sys.stderr),
    )
    return CompiledModel.from_pretrained(artifact.uri, threads=settings.threads)


def main() -> None:
    """Compile and time every target that can compile here."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=None, help="default: all-MiniLM-L6-v2")
    parser.add_argument("--pairs", type=int, default=50)
    given = parser.parse_args()
    model = given.model or demo_model()
    import numpy as np
    import torch

    threads = get_settings().threads
    torch.set_num_threads(threads)
    graph = load_source_graph(model, detect_task(model))
    random = np.random.default_rng(1)
    rows: dict[str, list[Latency]] = {}
    for name in target_names():
        if not get_target(name).probe().can_compile:
            continue
        candidate = compiled(model, name)
        rows[name] = []
        for batch_size, length in SHAPES:
            ids = random.integers(0, graph.vocab_size, (batch_size, length))
            inputs = {record.name: np.zeros_like(ids) for record in graph.inputs}
            inputs |= {"input_ids": ids, "attention_mask": np.ones_like(ids)}
            rows[name].append(
                time_pairs(
                    f"{batch_size} x {length}",
                    lambda inputs=inputs: graph.run(inputs),
                    lambda inputs=inputs, candidate=candidate: candidate.run(inputs),
                    pairs=given.pairs,
                    budget_s=30.0,
                )
            )
        candidate.close()
    answer = {
        "question": "median latency of a compiled model as a fraction of eager's; below 1 is faster",
        "model": model.parent.name if model.name == "model" else model.name,
        "environment": environment(threads),
        "results": {name: [asdict(latency) for latency in latencies] for name, latencies in rows.items()},
    }
    print(json.dumps(answer, indent=1))


if __name__ == "__main__":
    main()
