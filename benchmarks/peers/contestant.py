"""One contestant of the race of sentence embeddings, in a process of its own: requests and answers as JSON lines.

It runs in the environment of the peers or in that of compileflow, and imports only the contestant's own packages.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Of all-MiniLM-L6-v2. The bare sessions cut there, as sentence-transformers does.
MAX_TOKENS = 256
Embed = Callable[[Sequence[str]], Any]


def sentence_transformers(path: Path, settings: dict[str, Any]) -> Embed:
    """Load with one of the back ends of sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(path), device="cpu", **settings)
    return lambda texts: model.encode(list(texts), show_progress_bar=False)


def fastembed(path: Path, settings: dict[str, Any]) -> Embed:
    """Load an exported ONNX file with fastembed."""
    from fastembed import TextEmbedding

    name = "sentence-transformers/all-MiniLM-L6-v2"
    model = TextEmbedding(name, specific_model_path=str(path), threads=os.cpu_count())
    return lambda texts: np.array(list(model.embed(list(texts))))


def compileflow(path: Path, settings: dict[str, Any]) -> Embed:
    """Load a compiled artifact."""
    from compileflow import LightPipeline

    pipeline = LightPipeline.from_pretrained(settings["uri"], threads=os.cpu_count())
    return lambda texts: pipeline(list(texts))


def bare_onnxruntime(path: Path, settings: dict[str, Any]) -> Embed:
    """Load a bare session of ONNX Runtime beside the package tokenizers."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = os.cpu_count()
    session = onnxruntime.InferenceSession(str(path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return _bare(path, lambda inputs: session.run(None, inputs)[0])


def bare_openvino(path: Path, settings: dict[str, Any]) -> Embed:
    """Load a bare request of OpenVINO beside the package tokenizers."""
    import openvino

    config = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(str(path / "openvino_model.xml"), "CPU", config)
    return _bare(path, lambda inputs: compiled(inputs)[0])


def _bare(path: Path, run: Callable[[dict[str, Any]], Any]) -> Embed:
    """Embed one text after another: tokens, the session, mean pooling and unit length."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)

    def embed(text: str) -> Any:
        encoding = tokenizer.encode(text)
        fields = {
            "input_ids": encoding.ids,
            "attention_mask": encoding.attention_mask,
            "token_type_ids": encoding.type_ids,
        }
        mean = run({name: np.array([values]) for name, values in fields.items()})[0].mean(axis=0)
        return mean / np.linalg.norm(mean)

    return lambda texts: np.array([embed(text) for text in texts])


def export(model: Path, folder: Path) -> None:
    """Write what the peers load: the model in the formats of ONNX and OpenVINO, and quantized."""
    from sentence_transformers import SentenceTransformer, export_dynamic_quantized_onnx_model

    for backend in ("onnx", "openvino"):
        exported = SentenceTransformer(str(model), device="cpu", backend=backend)
        exported.save_pretrained(str(folder / backend))
        if backend == "onnx":
            export_dynamic_quantized_onnx_model(exported, "avx512_vnni", str(folder / backend))
    for backend, pattern in (("onnx", "model.onnx"), ("openvino", "openvino_model.*")):
        # fastembed and the bare sessions look for the file beside the tokenizer.
        for path in (folder / backend / backend).glob(pattern):
            os.link(path, folder / backend / path.name)


KINDS = {
    function.__name__: function
    for function in (sentence_transformers, fastembed, compileflow, bare_onnxruntime, bare_openvino)
}


def main() -> None:
    """Export, or load and answer until the input ends."""
    request = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    # What libraries print must not reach the answers.
    os.dup2(2, 1)
    if request["kind"] == "export":
        return export(Path(request["path"]), Path(request["folder"]))

    def send(**values: Any) -> None:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        peak = {"cpu_s": time.process_time(), "peak_bytes": usage.ru_maxrss * 1024}
        answers.write(json.dumps({**values, **peak}) + "\n")
        answers.flush()

    try:
        embed = KINDS[request["kind"]](Path(request["path"]), request["settings"])
        embed(["The first text."])
        # The start is the parent's: imports count.
        send(load_s=time.time() - request["started_at"])
        for line in sys.stdin:
            asked = json.loads(line)
            texts = asked["texts"]
            start = time.perf_counter()
            vectors = np.concatenate([embed([text]) for text in texts]) if asked["single"] else embed(texts)
            seconds = time.perf_counter() - start
            send(seconds=seconds, vectors=np.asarray(vectors).tolist() if asked["keep"] else None)
    except Exception as error:  # noqa: BLE001 - the parent leaves the contestant out
        send(error=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
