"""One contender in a process of its own: it loads a model, then writes on from prompts. Requests are JSON lines.

python -m benchmarks.generation.writers REQUEST

REQUEST is a JSON object with the "kind" of the contender, the "path" of what it loads, "threads" and "settings".
The first answer gives the memory of the load. Each further request holds a "prompt", a list of token ids, and
"tokens", the number of tokens to write; no token ends a text early. The answer has the new tokens, the seconds of
the call, the processor time of the process and its largest memory so far. Any answer may be an "error" instead.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

# Writes a number of tokens after a prompt, greedily, and returns them.
Writer = Callable[[Sequence[int], int], list[int]]


def transformers_writer(path: str, threads: int, settings: Mapping[str, Any]) -> Writer:
    """Load a model in eager PyTorch, or one whose steps with a static cache torch.compile compiles."""
    from transformers import AutoModelForCausalLM
    from transformers.generation import CompileConfig

    model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
    extra: dict[str, Any] = {}
    if settings["compile"]:
        compile_settings = CompileConfig(mode="default")
        # Without it, transformers compiles on accelerators alone.
        compile_settings._compile_all_devices = True
        extra = {"cache_implementation": "static", "compile_config": compile_settings}
    return _generate(model, extra)


def compileflow_writer(path: str, threads: int, settings: Mapping[str, Any]) -> Writer:
    """Load an artifact as a user does."""
    from compileflow import CompiledModel

    return _generate(CompiledModel.from_pretrained(path, threads=threads), {})


def openvino_genai_writer(path: str, threads: int, settings: Mapping[str, Any]) -> Writer:
    """Load a folder with an IR and its tokenizer."""
    import numpy as np
    import openvino
    import openvino_genai

    # A cached prefix would spare this contender the reading of a prompt.
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    properties = {**settings, "INFERENCE_NUM_THREADS": threads, "scheduler_config": scheduler}
    pipeline = openvino_genai.LLMPipeline(path, "CPU", **properties)

    def write(prompt: Sequence[int], tokens: int) -> list[int]:
        ids = openvino.Tensor(np.asarray([prompt], np.int64))
        config = openvino_genai.GenerationConfig(max_new_tokens=tokens, ignore_eos=True, do_sample=False)
        return list(pipeline.generate(ids, config).tokens[0])

    return write


def onnxruntime_genai_writer(path: str, threads: int, settings: Mapping[str, Any]) -> Writer:
    """Load a folder that the builder of onnxruntime-genai wrote."""
    import onnxruntime_genai

    config = onnxruntime_genai.Config(path)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = onnxruntime_genai.Model(config)

    def write(prompt: Sequence[int], tokens: int) -> list[int]:
        parameters = onnxruntime_genai.GeneratorParams(model)
        length = len(prompt) + tokens
        parameters.set_search_options(min_length=length, max_length=length, do_sample=False)
        generator = onnxruntime_genai.Generator(model, parameters)
        generator.append_tokens(list(prompt))
        new_tokens = []
        while not generator.is_done():
            generator.generate_next_token()
            new_tokens.append(int(generator.get_next_tokens()[0]))
        return new_tokens

    return write


_WRITERS: dict[str, Callable[[str, int, Mapping[str, Any]], Writer]] = {
    "transformers": transformers_writer,
    "compileflow": compileflow_writer,
    "openvino_genai": openvino_genai_writer,
    "onnxruntime_genai": onnxruntime_genai_writer,
}


def _import_libraries(kind: str, settings: Mapping[str, Any]) -> None:
    """Import what a kind of contender uses, so that its memory does not count as that of a load."""
    with_generate = ("torch", "transformers.generation.utils", "transformers.models.llama.modeling_llama")
    names = {
        "transformers": with_generate,
        "compileflow": (*with_generate, "compileflow.serving.generation", settings.get("runtime")),
        "openvino_genai": ("openvino", "openvino_genai"),
        "onnxruntime_genai": ("onnxruntime_genai",),
    }
    for name in names[kind]:
        import_module(name)
    if "openvino" in sys.modules:
        # OpenVINO loads the library of a device when it is first asked about it.
        sys.modules["openvino"].Core().get_versions("CPU")


def _generate(model: Any, extra: Mapping[str, Any]) -> Writer:
    """Return the writer of a model that has transformers' `generate`."""
    import torch

    model.generation_config.eos_token_id = None

    def write(prompt: Sequence[int], tokens: int) -> list[int]:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        rows = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, **extra)
        new_tokens: list[int] = rows[0, len(prompt) :].tolist()
        return new_tokens

    return write


def _memory_bytes(field: str) -> int:
    """Return a field of the process's memory, in bytes: VmRSS is what it has now, VmHWM the largest so far."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def main() -> None:
    """Load the contender that the argument describes, and answer requests until there are none."""
    request = json.loads(sys.argv[1])
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(make: Callable[[], dict[str, Any]]) -> None:
        try:
            values = make()
        except Exception as error:  # noqa: BLE001 - the reader of the answers says which contender failed
            values = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    writers: list[Writer] = []
    earlier_peak = 0

    def load() -> dict[str, Any]:
        nonlocal earlier_peak
        kind, threads = request["kind"], request["threads"]
        _import_libraries(kind, request["settings"])
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(threads)
        earlier_peak, before = _memory_bytes("VmHWM"), _memory_bytes("VmRSS")
        # 5 makes the largest memory so far the present one: proc(5).
        Path("/proc/self/clear_refs").write_text("5", "ascii")
        writers.append(_WRITERS[kind](request["path"], threads, request["settings"]))
        return {"load_peak_bytes": _memory_bytes("VmHWM") - before}

    def write(line: str) -> dict[str, Any]:
        wanted = json.loads(line)
        start = time.perf_counter()
        tokens = writers[0](wanted["prompt"], wanted["tokens"])
        return {
            "seconds": time.perf_counter() - start,
            "tokens": tokens,
            "cpu_s": time.process_time(),
            "peak_bytes": max(earlier_peak, _memory_bytes("VmHWM")),
        }

    answer(load)
    for line in sys.stdin:
        answer(lambda line=line: write(line))  # type: ignore[misc]


if __name__ == "__main__":
    main()
