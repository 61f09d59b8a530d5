"""Sentence vectors of all-MiniLM-L6-v2: compiled models beside their peers and the limit. JSON on standard output.

python benchmarks/exp_peers.py --peers-python FILE [--minutes N] [--page docs/reference/performance.md]

`make bench-peers` builds the peers' environment and runs this. Each contestant is a process of its own, and all
take turns in each round: texts one at a time, a list of sentences, and a list of paragraphs. The limit is the rate
of plain matrix products in the same rounds. The peers' exported files stay under COMPILEFLOW_HOME.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.children import ROOT, Child, ContenderError, quartiles, sample
from benchmarks.compiled import compiled_uri, print_rows
from benchmarks.exp_text_stream import stream
from benchmarks.peers.page import contestant_rows, goal_rows, write_page
from compileflow.cli.demo import demo_model
from compileflow.errors import CompileflowError
from compileflow.settings import Settings, get_settings
from compileflow.spec import HfTask
from compileflow.validation.measure.contention import disturbance
from compileflow.validation.report import environment

SCRIPT = ROOT / "benchmarks" / "peers" / "contestant.py"
REFERENCE = "sentence-transformers torch"
TARGETS = (("onnx-runtime", "fp32"), ("openvino", "fp32"), ("openvino", "bf16"), ("openvino", "int8"))
LONGEST = 256
# Median tokens and spread of log-normal lengths, and texts in each request.
TEXTS = {"sentences": (20, 0.6), "paragraphs": (205, 0.2)}
NEIGHBOURS = 10
# Long enough for the spinning threads of the previous contestant to go to sleep.
PAUSE_S = 0.1
# Rows, inner size and columns of the matrix product that is the limit.
PRODUCT = (2048, 1536, 1536)


@dataclass(frozen=True)
class Contestant:
    """One way to embed texts.

    Attributes:
        name: Name in the tables.
        kind: How benchmarks/peers/contestant.py loads it.
        path: Folder of what it loads.
        settings: Settings of the loader.
        precision: fp32 or bf16 where the limit of that precision applies.
        takes_lists: Whether it is faster on lists than one text after another.
    """

    name: str
    kind: str
    path: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    precision: str = ""
    takes_lists: bool = True

    @property
    def is_peer(self) -> bool:
        """Whether it runs in the environment of the peers."""
        return self.kind != "compileflow"


def peers(model: Path, folder: Path, python: str | None) -> list[Contestant]:
    """Export the model for the peers, if that is not done, and return them; without their Python, the reference.

    Raises:
        ContenderError: The export fails.
    """
    kind = "sentence_transformers"
    reference = Contestant(REFERENCE, kind, model, precision="fp32")
    if python is None:
        return [reference]
    if not folder.exists():
        partial_dir = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial_dir, ignore_errors=True)
        request = {"kind": "export", "path": str(model), "folder": str(partial_dir)}
        done = subprocess.run(
            [python, str(SCRIPT), json.dumps(request)],
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise ContenderError(f"the export for the peers failed: {done.stderr.strip()[-300:]}")
        partial_dir.rename(folder)
    onnx_dir, ir_dir = folder / "onnx", folder / "openvino"

    def settings(backend: str, **model_settings: Any) -> dict[str, Any]:
        return {"backend": backend, "model_kwargs": model_settings}

    exact = {"ov_config": {"INFERENCE_PRECISION_HINT": "f32"}}
    quantized = {"file_name": "onnx/model_qint8_avx512_vnni.onnx"}
    return [
        reference,
        Contestant("sentence-transformers onnx", kind, onnx_dir, settings("onnx"), "fp32"),
        Contestant("sentence-transformers onnx qint8", kind, onnx_dir, settings("onnx", **quantized)),
        Contestant("sentence-transformers openvino fp32", kind, ir_dir, settings("openvino", **exact), "fp32"),
        Contestant("sentence-transformers openvino", kind, ir_dir, settings("openvino")),
        Contestant("fastembed", "fastembed", onnx_dir, precision="fp32"),
        Contestant("onnxruntime and tokenizers", "bare_onnxruntime", onnx_dir, takes_lists=False),
        Contestant("openvino fp32 and tokenizers", "bare_openvino", ir_dir, takes_lists=False),
    ]


def compiled(
    model: Path, targets: Sequence[tuple[str, str]], longest: int, *, settings: Settings
) -> tuple[list[Contestant], dict[str, str]]:
    """Compile, or take from the store; return the contestants, and why others are left out."""
    contestants, left_out = [], {}
    for target, precision in targets:
        name = f"compileflow {target} {precision}"
        try:
            task = HfTask.SENTENCE_SIMILARITY.value
            uri = compiled_uri(model, target, task, [(8, longest)], settings=settings, precision=precision)
        except CompileflowError as error:
            left_out[name] = str(error)
            continue
        limit = precision if precision in ("fp32", "bf16") else ""
        contestants.append(Contestant(name, "compileflow", model, {"uri": uri}, limit))
    return contestants, left_out


def product_rates(threads: int) -> dict[str, Callable[[], float]]:
    """Return a function for each precision that measures the floating-point operations per second of a product."""
    import torch

    torch.set_num_threads(threads)
    rows, inner, columns = PRODUCT

    def rate(dtype: torch.dtype, times: int = 3) -> float:
        left, right = torch.ones(rows, inner, dtype=dtype), torch.ones(inner, columns, dtype=dtype)
        seconds = []
        for _ in range(times + 1):
            start = time.perf_counter()
            torch.mm(left, right)
            seconds.append(time.perf_counter() - start)
        # The first product packs and warms up.
        return 2 * rows * inner * columns / min(seconds[1:])

    return {"fp32": lambda: rate(torch.float32), "bf16": lambda: rate(torch.bfloat16)}


def operations_per_token(model: Path) -> int:
    """Return the operations of the matrix products with weights, for one token; attention is not counted."""
    config = json.loads((model / "config.json").read_text("utf-8"))
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    return 2 * int(config["num_hidden_layers"]) * (4 * hidden**2 + 2 * hidden * inner)


def race(
    contestants: Sequence[Contestant], texts: Mapping[str, Sequence[str]], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Let all contestants embed in turns, in processes of their own; return what was measured of each."""
    threads = arguments.threads
    children: dict[str, Child] = {}
    left_out: dict[str, str] = {}
    rows: dict[str, dict[str, Any]] = {}
    vectors: dict[str, Any] = {}
    by_name = {contestant.name: contestant for contestant in contestants}
    probe = [*texts["sentences"], *texts["paragraphs"]]
    columns = {
        "single": (list(texts["sentences"][: arguments.singles]), True),
        "sentences": (list(texts["sentences"]), False),
        "paragraphs": (list(texts["paragraphs"]), False),
    }
    rates: dict[str, list[float]] = {"fp32": [], "bf16": []}
    try:
        # One after the other, because each load is timed.
        for contestant in contestants:
            python = (contestant.is_peer and arguments.peers_python) or sys.executable
            request = {
                "kind": contestant.kind,
                "path": str(contestant.path),
                "settings": dict(contestant.settings),
                "started_at": time.time(),
            }
            log_path = get_settings().log_path(f"peers-{contestant.name.replace(' ', '-')}")
            child = Child([python, str(SCRIPT), json.dumps(request)], threads, log_path)
            children[contestant.name] = child
            print(f"loading {contestant.name}", file=sys.stderr, flush=True)
            try:
                load = child.answer()
                vectors[contestant.name] = child.ask(texts=probe, single=False, keep=True)["vectors"]
            except ContenderError as error:
                left_out[contestant.name] = str(error)
                print(f"left out: {contestant.name}: {error}", file=sys.stderr)
                children.pop(contestant.name).close()
                continue
            rows[contestant.name] = {"load_s": load["load_s"], "load_bytes": load["peak_bytes"]}
            rows[contestant.name] |= {column: [] for column in columns}
        if REFERENCE not in rows:
            raise SystemExit(f"The reference cannot run: {left_out[REFERENCE]}")
        measure = product_rates(threads)
        before = sample(children.values(), threads)
        end = time.monotonic() + 60 * arguments.minutes
        number = 0
        while number < 2 or time.monotonic() < end:
            print(f"round {number + 1}", file=sys.stderr, flush=True)
            # The first contestant changes every round.
            names = list(children)
            turn = number % len(names)
            for column, (items, single) in columns.items():
                for precision, rate in measure.items():
                    rates[precision].append(rate())
                for name in (*names[turn:], *names[:turn]):
                    if not single and not by_name[name].takes_lists:
                        continue
                    time.sleep(PAUSE_S)
                    answer = children[name].ask(texts=items, single=single, keep=False)
                    rows[name][column].append(len(items) / answer["seconds"])
                    rows[name]["peak_bytes"] = answer["peak_bytes"]
            number += 1
        after = sample(children.values(), threads)
    finally:
        for child in children.values():
            child.close()
    reference = rows[REFERENCE]
    ratios = [
        np.divide(row[column], reference[column]) for row in rows.values() for column in columns if row[column]
    ]
    return {
        "busy": disturbance([before, after], threads, ratios=np.concatenate(ratios)),
        "rounds": number,
        "left_out": left_out,
        # The best, because it is the limit.
        "products_per_s": {precision: max(values) for precision, values in rates.items()},
        "contestants": {
            name: {
                **{column: quartiles(row[column]) if row[column] else None for column in columns},
                "neighbours": same_neighbours(vectors[name], vectors[REFERENCE]),
                "load_s": row["load_s"],
                "load_bytes": row["load_bytes"],
                "peak_bytes": row["peak_bytes"],
                "is_peer": by_name[name].is_peer,
                "limit": by_name[name].precision,
            }
            for name, row in rows.items()
        },
    }


def same_neighbours(vectors: Any, right: Any) -> float:
    """Return the share of the nearest texts of each text that are also its nearest by the right vectors."""

    def nearest(values: Any) -> Any:
        unit = np.asarray(values) / np.linalg.norm(values, axis=1, keepdims=True)
        similarity = unit @ unit.T
        np.fill_diagonal(similarity, -np.inf)
        return np.argsort(-similarity, axis=1)[:, :NEIGHBOURS]

    pairs = zip(nearest(vectors), nearest(right), strict=True)
    return float(np.mean([len(set(found) & set(expected)) / NEIGHBOURS for found, expected in pairs]))


def main() -> None:
    """Export, compile, race and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peers-python", help="Python of the peers' environment; without it, sentence-transformers alone"
    )
    parser.add_argument("--model", type=Path, help="folder of a model of sentence-transformers; default: MiniLM")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--minutes", type=float, default=3, help="time for the rounds; at least two are run")
    parser.add_argument("--singles", type=int, default=16, help="texts one at a time in each round")
    parser.add_argument("--sentences", type=int, default=160, help="sentences of a list")
    parser.add_argument("--paragraphs", type=int, default=24, help="paragraphs of a list")
    parser.add_argument("--among", action="append", default=[], help="a part of the names of compiled contestants")
    parser.add_argument("--page", type=Path, help="write the page of the documentation and its picture")
    parser.add_argument("--results", type=Path, help="take the figures of an earlier run from its JSON")
    arguments = parser.parse_args()
    earlier = arguments.results
    answer = json.loads(earlier.read_text("utf-8")) if earlier else measured(arguments)
    if answer["busy"]:
        print(f"on a busy machine: {answer['busy']}", file=sys.stderr)
    print_rows(contestant_rows(answer))
    print_rows(goal_rows(answer))
    if arguments.page:
        write_page(answer, arguments.page)
    print(json.dumps(answer, indent=1))


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Race the contestants; return the figures with the machine and the versions."""
    from tokenizers import Tokenizer

    settings = get_settings().model_copy(update={"threads": arguments.threads})
    model = arguments.model or demo_model()
    targets = [pair for pair in TARGETS if not arguments.among or any(part in pair for part in arguments.among)]
    positions = json.loads((model / "config.json").read_text("utf-8"))["max_position_embeddings"]
    longest = min(LONGEST, positions)
    own, left_out = compiled(model, targets, longest, settings=settings)
    contestants = [*peers(model, settings.home_dir / "peers" / model.name, arguments.peers_python), *own]
    backend = Tokenizer.from_file(str(model / "tokenizer.json"))
    backend.no_padding()
    backend.no_truncation()
    counts = {"sentences": arguments.sentences, "paragraphs": arguments.paragraphs}
    texts, tokens = {}, {}
    for name, (median, spread) in TEXTS.items():
        texts[name] = stream(
            lambda text: {"input_ids": backend.encode(text).ids},
            counts[name],
            longest,
            median=median,
            spread=spread,
        )
        lengths = [len(encoding.ids) for encoding in backend.encode_batch(texts[name])]
        tokens[name] = {
            "texts": len(lengths),
            "median": float(np.median(lengths)),
            "mean": float(np.mean(lengths)),
        }
    results = race(contestants, texts, arguments)
    versions = subprocess.run(
        [arguments.peers_python or sys.executable, "-m", "pip", "freeze", "--disable-pip-version-check"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    names = ("sentence-transformers", "fastembed", "optimum-intel", "optimum-onnx", "transformers", "torch")
    return {
        "question": "texts embedded per second by compiled models, their peers, and plain matrix products",
        "environment": environment(arguments.threads),
        "peers": dict(
            sorted(line.split("==") for line in versions.splitlines() if line.partition("==")[0] in names)
        ),
        "tokens": tokens,
        "operations_per_token": operations_per_token(model),
        **results,
        "left_out": left_out | results["left_out"],
    }


if __name__ == "__main__":
    main()
