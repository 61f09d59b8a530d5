"""Speed, memory and equal tokens of text generation, beside the limit of the memory. JSON on standard output.

python benchmarks/exp_generation.py --model FOLDER [--rounds N] [--page docs/reference/generation-speed.md]

The decoder in FOLDER and a random Llama of 8 layers write greedily: eager transformers, torch.compile, each
compiled model, openvino_genai and onnxruntime-genai on the same weights. Each contender is a process of its own,
and all take turns in each round. Artifacts and the files of the peers stay under COMPILEFLOW_HOME, so that a
further run only measures. Nothing is validated; a verdict that the store has is shown.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.children import Child, ContenderError, quartiles, sample
from benchmarks.compiled import print_rows, sentences
from benchmarks.generation.page import contender_rows, goal_rows, write_page
from benchmarks.generation.weights import onnx_bytes, openvino_bytes, torch_bytes
from compileflow.artifact.manifest import read_manifest
from compileflow.catalog import open_store
from compileflow.contracts.toolkit import installed_versions
from compileflow.errors import CompileflowError, StepOffError
from compileflow.settings import Settings, get_settings
from compileflow.spec import HfTask
from compileflow.steps.compile import compile_artifact
from compileflow.steps.fetch import fetch_source
from compileflow.steps.request import CompileRequest
from compileflow.steps.validate import validate_artifact
from compileflow.steps.values import CompiledArtifact, FetchedSource
from compileflow.validation.measure.contention import disturbance
from compileflow.validation.report import environment

EAGER, COMPILED = "eager fp32", "torch.compile fp32"
TARGETS = {
    "openvino": ("fp32", "bf16", "int8", "int4"),
    "onnx-runtime": ("fp32", "int8", "int4"),
    "aot-inductor": ("fp32",),
}
# The module of each target's runtime.
RUNTIMES = {"openvino": "openvino", "onnx-runtime": "onnxruntime", "aot-inductor": "torch"}
# Precisions of onnxruntime-genai that the builder makes for CPUs and that are compared.
BUILT = ("fp32", "int4")
RANDOM_LLAMA = "llama-8x512"
# Long enough for the spinning threads of the previous contender to go to sleep.
PAUSE_S = 0.1
# Numbers in each array of the triad: far more than fit into a cache.
TRIAD_SIZE = 32 * 2**20


@dataclass(frozen=True)
class Contender:
    """One way to write on from a prompt.

    Attributes:
        name: Name in the table.
        kind: How benchmarks.generation.writers loads it.
        path: Folder or URI of what it loads.
        bytes_per_token: Bytes of its weights that a token reads.
        size_bytes: Size of what it loads.
        settings: Settings of the writer.
        peer: Name of the contender of another library on the same weights.
        cost: Cost of its compile, and its verdict.
    """

    name: str
    kind: str
    path: str
    bytes_per_token: int
    size_bytes: int
    settings: dict[str, Any] = field(default_factory=dict)
    peer: str = ""
    cost: dict[str, Any] = field(default_factory=dict)


def command(contender: Contender, threads: int) -> list[str]:
    """Return the command of a contender's process."""
    request = {
        "kind": contender.kind,
        "path": contender.path,
        "threads": threads,
        "settings": contender.settings,
    }
    return [sys.executable, "-m", "benchmarks.generation.writers", json.dumps(request)]


def random_llama(tokenizer_dir: Path, folder: Path) -> Path:
    """Write a Llama of 8 layers and 512 hidden features with random weights, and return the folder.

    The weights are so large that two tokens are hardly ever equally likely.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if not folder.exists():
        torch.manual_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir, local_files_only=True)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=8,
            num_attention_heads=8,
            initializer_range=0.1,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        partial_dir = folder.with_name(f"{folder.name}.partial")
        LlamaForCausalLM(config).save_pretrained(partial_dir)
        tokenizer.save_pretrained(partial_dir)
        partial_dir.rename(folder)
    return folder


def triad_bytes_per_s(threads: int, *, times: int = 10) -> float:
    """Return the bandwidth of a = b + 3 c, counted as STREAM does: two arrays are read and one is written."""
    import torch

    torch.set_num_threads(threads)
    first, second, total = torch.ones(TRIAD_SIZE), torch.ones(TRIAD_SIZE), torch.zeros(TRIAD_SIZE)
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        torch.add(first, second, alpha=3.0, out=total)
        seconds.append(time.perf_counter() - start)
    return 3 * 4 * TRIAD_SIZE / min(seconds)


def contenders(model: Path, *, settings: Settings, only: Sequence[str]) -> tuple[list[Contender], dict[str, str]]:
    """Compile, or take from the store, all that can run here; return them, and why others are left out."""
    store_uri = settings.resolved_store_uri()
    source = fetch_source(str(model), None, store_uri=store_uri, settings=settings)
    weights = folder_bytes(model, "*.safetensors")
    eager_bytes = torch_bytes(model)
    racers = [
        Contender(EAGER, "transformers", str(model), eager_bytes, weights, {"compile": False}),
        Contender(COMPILED, "transformers", str(model), eager_bytes, weights, {"compile": True}),
    ]
    left_out: dict[str, str] = {} if has_openvino_genai() else {"openvino_genai": "it is not installed"}
    peers_dir = settings.home_dir / "generation" / source.digest[:12]
    for target, precisions in TARGETS.items():
        for precision in precisions:
            name = f"{target} {precision}"
            if only and not any(part in name for part in only):
                continue
            try:
                racers += compiled_contenders(model, source, target, precision, peers_dir, settings=settings)
            except (CompileflowError, ContenderError) as error:
                left_out[name] = str(error)
    for precision in BUILT:
        name = f"onnxruntime-genai {precision}"
        if only and not any(part in name for part in only):
            continue
        try:
            racers.append(built_contender(name, model, precision, peers_dir))
        except ContenderError as error:
            left_out[name] = str(error)
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}", file=sys.stderr)
    return racers, left_out


def compiled_contenders(
    model: Path, source: FetchedSource, target: str, precision: str, peers_dir: Path, *, settings: Settings
) -> list[Contender]:
    """Compile for a target; for openvino, also let openvino_genai run the same IR."""
    request = CompileRequest.model_validate(
        {"model": str(model), "target": target, "hf_task": HfTask.TEXT_GENERATION, "precision": precision}
    )
    print(f"compiling {model.name} for {target} {precision}", file=sys.stderr, flush=True)
    artifact = compile_artifact(
        source,
        request,
        store_uri=settings.resolved_store_uri(),
        settings=settings,
        on_progress=lambda line: None,
    )
    cost = {
        "compile_s": artifact.compile_duration_s,
        "peak_bytes": artifact.peak_rss_bytes,
        "weights_bytes": folder_bytes(model, "*.safetensors"),
        "verdict": verdict(source, artifact, request, settings),
    }
    settings_of_peer: dict[str, Any] = {}
    with open_store(settings.resolved_store_uri(), settings).open_folder(artifact.digest) as folder:
        [component] = read_manifest(folder).components.values()
        component_dir, options = folder / component.folder, component.load_options
        if target == "openvino":
            bits = 16 if precision == "bf16" else 32
            read_bytes = openvino_bytes(component_dir / "openvino_model.xml", bits=bits)
            peer = f"openvino_genai {precision}"
            if has_openvino_genai():
                ir_dir = ir_folder(model, component_dir, peers_dir / artifact.digest[:12])
                settings_of_peer = {
                    "INFERENCE_PRECISION_HINT": options["inference_precision"],
                    "KV_CACHE_PRECISION": options["kv_cache_precision"],
                    "DYNAMIC_QUANTIZATION_GROUP_SIZE": options["dynamic_quantization_group_size"],
                }
        elif target == "onnx-runtime":
            read_bytes = onnx_bytes(component_dir / "model.onnx")
            peer = f"onnxruntime-genai {precision}" if precision in BUILT else ""
        else:
            read_bytes, peer = torch_bytes(model), ""
    compiled = Contender(
        f"{target} {precision}",
        "compileflow",
        artifact.uri,
        read_bytes,
        artifact.size_bytes,
        {"runtime": RUNTIMES[target]},
        peer,
        cost,
    )
    if not settings_of_peer:
        return [compiled]
    return [
        compiled,
        replace(
            compiled,
            name=peer,
            kind="openvino_genai",
            path=str(ir_dir),
            settings=settings_of_peer,
            peer="",
            cost={},
        ),
    ]


def has_openvino_genai() -> bool:
    """Return whether openvino_genai and its tokenizers are installed."""
    return len(installed_versions(("openvino-genai", "openvino-tokenizers"))) == 2


def ir_folder(model: Path, component_dir: Path, folder: Path) -> Path:
    """Return a folder for openvino_genai: the IR of an artifact, and the tokenizer of its model as two more."""
    import openvino
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoTokenizer

    if folder.exists():
        return folder
    partial_dir = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial_dir, ignore_errors=True)
    partial_dir.mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    for name, part in zip(
        ("tokenizer", "detokenizer"), convert_tokenizer(tokenizer, with_detokenizer=True), strict=True
    ):
        openvino.save_model(part, str(partial_dir / f"openvino_{name}.xml"))
    # The folder that a store opens may go away.
    for path in (*component_dir.iterdir(), model / "config.json"):
        shutil.copyfile(path, partial_dir / path.name)
    partial_dir.rename(folder)
    return folder


def built_contender(name: str, model: Path, precision: str, peers_dir: Path) -> Contender:
    """Let the builder of onnxruntime-genai make a folder from the same weights.

    Raises:
        ContenderError: It is not installed, or it failed.
    """
    folder = peers_dir / name.replace(" ", "-")
    if not installed_versions(("onnxruntime-genai",)):
        raise ContenderError("it is not installed")
    if not folder.exists():
        print(f"building {name} of {model.name}", file=sys.stderr, flush=True)
        partial_dir = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial_dir, ignore_errors=True)
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", str(model), "-i", str(model)]
        builder += ["-o", str(partial_dir), "-c", str(peers_dir / "cache"), "-p", precision, "-e", "cpu"]
        done = subprocess.run(
            builder, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise ContenderError(f"the builder failed: {done.stderr.strip().rpartition(chr(10))[2]}")
        partial_dir.rename(folder)
    size_bytes = folder_bytes(folder, "*")
    return Contender(name, "onnxruntime_genai", str(folder), onnx_bytes(folder / "model.onnx"), size_bytes)


def verdict(source: FetchedSource, artifact: CompiledArtifact, request: CompileRequest, settings: Settings) -> str:
    """Return the verdict on an artifact that the store has; "" without one."""
    try:
        return validate_artifact(
            source,
            artifact,
            request.validation,
            store_uri=settings.resolved_store_uri(),
            settings=settings,
            timeout_s=0,
            request=request,
            enabled=False,
        ).outcome
    except StepOffError:
        return ""


def folder_bytes(folder: Path, pattern: str) -> int:
    """Return the size of the files in a folder whose names fit a pattern."""
    return sum(path.stat().st_size for path in folder.glob(pattern) if path.is_file())


def prompts(tokenizer_dir: Path, count: int, length: int) -> list[list[int]]:
    """Return different prompts of so many tokens, from the natural sentences of the library."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir, local_files_only=True)
    ids: list[int] = tokenizer(" ".join(sentences()), add_special_tokens=False)["input_ids"]
    starts = np.linspace(0, len(ids) - length, count, dtype=int)
    return [ids[start : start + length] for start in starts]


def race(
    model: Path,
    racers: Sequence[Contender],
    left_out: dict[str, str],
    arguments: argparse.Namespace,
    settings: Settings,
) -> dict[str, Any]:
    """Let all contenders write in turns, in processes of their own; return what was measured of each."""
    threads, tokens = arguments.threads, arguments.tokens
    children: dict[str, Child] = {}
    rows: dict[str, dict[str, Any]] = {}
    warm_prompt, *texts = prompts(model, 1 + 2 * arguments.rounds, arguments.prompt)
    try:
        for racer in racers:
            log_path = settings.log_path(f"{model.name}-{racer.name.replace(' ', '-')}")
            children[racer.name] = Child(command(racer, threads), threads, log_path)
        for racer in racers:
            try:
                load = children[racer.name].answer()
                # The longest text first: it sizes a static cache.
                children[racer.name].ask(prompt=warm_prompt, tokens=tokens)
                children[racer.name].ask(prompt=warm_prompt, tokens=1)
            except ContenderError as error:
                left_out[racer.name] = str(error)
                print(f"left out: {racer.name}: {error}", file=sys.stderr)
                children.pop(racer.name).close()
                continue
            rows[racer.name] = {
                "load_peak_bytes": load["load_peak_bytes"],
                "first_s": [],
                "whole_s": [],
                "texts": [],
            }
        if EAGER not in rows:
            raise SystemExit(f"The baseline cannot run: {left_out[EAGER]}")
        bandwidth = triad_bytes_per_s(threads)
        before = sample(children.values(), threads)
        for number in range(arguments.rounds):
            print(f"{model.name}: round {number + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
            # The first contender changes every round.
            names = list(children)
            turn = number % len(names)
            for name in (*names[turn:], *names[:turn]):
                time.sleep(PAUSE_S)
                child = children[name]
                child.ask(prompt=warm_prompt, tokens=1)
                first = child.ask(prompt=texts[2 * number], tokens=1)
                whole = child.ask(prompt=texts[2 * number + 1], tokens=tokens)
                row = rows[name]
                row["first_s"].append(first["seconds"])
                row["whole_s"].append(whole["seconds"])
                row["texts"].append(whole["tokens"])
                row["peak_bytes"] = whole["peak_bytes"]
        after = sample(children.values(), threads)
        bandwidth = max(bandwidth, triad_bytes_per_s(threads))
    finally:
        for child in children.values():
            child.close()
    for row in rows.values():
        # The median, because a single first token may be late.
        row["decode_s"] = np.asarray(row["whole_s"]) - np.median(row["first_s"])
    ratios = [np.divide(rows[EAGER]["decode_s"], row["decode_s"]) for row in rows.values()]
    return {
        "bandwidth_bytes_per_s": bandwidth,
        "busy": disturbance([before, after], threads, ratios=ratios),
        "left_out": left_out,
        "new_tokens": tokens,
        "contenders": {
            racer.name: summary(racer, rows, tokens, bandwidth) for racer in racers if racer.name in rows
        },
    }


def summary(racer: Contender, rows: dict[str, dict[str, Any]], tokens: int, bandwidth: float) -> dict[str, Any]:
    """Return the figures of one contender."""
    row, eager = rows[racer.name], rows[EAGER]
    rates = (tokens - 1) / row["decode_s"]
    limit = bandwidth / racer.bytes_per_token
    figures = {
        "tokens_per_s": quartiles(rates),
        "times_as_fast": quartiles(np.divide(eager["decode_s"], row["decode_s"])),
        "first_token_s": quartiles(row["first_s"]),
        "bytes_per_token": racer.bytes_per_token,
        "limit_tokens_per_s": limit,
        "share_of_limit": float(np.median(rates) / limit),
        "equal_tokens": [
            equal_tokens(text, right) for text, right in zip(row["texts"], eager["texts"], strict=True)
        ],
        "peak_bytes": row["peak_bytes"],
        "load_peak_bytes": row["load_peak_bytes"],
        "size_bytes": racer.size_bytes,
        "rounds": len(rates),
        "cost": racer.cost,
    }
    if racer.peer in rows:
        figures["peer"] = racer.peer
        figures["times_as_fast_as_peer"] = quartiles(np.divide(rows[racer.peer]["decode_s"], row["decode_s"]))
    return figures


def equal_tokens(text: Sequence[int], right: Sequence[int]) -> int:
    """Return the number of tokens before the first one that differs."""
    return next(
        (place for place, pair in enumerate(zip(text, right, strict=False)) if pair[0] != pair[1]), len(text)
    )


def main() -> None:
    """Compile, race and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a decoder")
    parser.add_argument("--threads", type=int, default=get_settings().threads)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to write")
    parser.add_argument(
        "--only", action="append", default=[], help="a part of the names of compiled models and peers"
    )
    parser.add_argument("--no-random", action="store_true", help="leave the random Llama out")
    parser.add_argument("--page", type=Path, help="write the page of the documentation and its picture")
    parser.add_argument("--results", type=Path, help="take the figures of an earlier run from its JSON")
    arguments = parser.parse_args()
    earlier = arguments.results
    answer = json.loads(earlier.read_text("utf-8")) if earlier else measured(arguments)
    for model, results in answer["results"].items():
        print(f"{model}: {results['busy'] and 'on a busy machine: ' + results['busy']}", file=sys.stderr)
        print_rows(contender_rows(results))
        print_rows(goal_rows(results))
    if arguments.page:
        write_page(answer, arguments.page)
    print(json.dumps(answer, indent=1))


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compile and race each model; return the figures with the machine and the versions."""
    settings = get_settings().model_copy(update={"threads": arguments.threads})
    models = [arguments.model]
    if not arguments.no_random:
        models.append(random_llama(arguments.model, settings.home_dir / "generation" / RANDOM_LLAMA))
    # Everything is compiled before anything is measured.
    entries = [(model, *contenders(model, settings=settings, only=arguments.only)) for model in models]
    results = {
        model.name: race(model, racers, left_out, arguments, settings) for model, racers, left_out in entries
    }
    peers = installed_versions(("openvino-genai", "openvino-tokenizers", "onnxruntime-genai"))
    return {
        "question": "tokens per second of greedy generation, compared with eager transformers and with the limit "
        "of the memory",
        "environment": environment(arguments.threads) | peers,
        "prompt_tokens": arguments.prompt,
        "new_tokens": arguments.tokens,
        "rounds": arguments.rounds,
        "results": results,
    }


if __name__ == "__main__":
    main()
