"""Decoders of many families write, once they are compiled, what transformers writes, token by token."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.architectures.classes import decoder_classes
from benchmarks.architectures.tiny_models import write_model
from benchmarks.forked_checks import read_results

ROOT = Path(__file__).parents[2]
FAMILIES = (
    "cohere",
    "falcon",
    "gemma",
    "gemma3_text",
    "gpt2",
    "gpt_bigcode",
    "gpt_neox",
    "gptj",
    "llama",
    "mistral",
    "olmo",
    "opt",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "stablelm",
    "starcoder2",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "families"),
    [
        ("openvino", FAMILIES),
        ("onnx-runtime", FAMILIES),
        # A window, and no positions as an input. Each compile takes half a minute.
        ("aot-inductor", ("gemma3_text", "opt")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_families_write_what_transformers_writes(tmp_path: Path, target: str, families: tuple[str, ...]) -> None:
    results = tmp_path / "results.jsonl"
    chosen = [argument for family in families for argument in ("--model-type", family)]
    command = [sys.executable, "-m", "benchmarks.architectures", "--decoders", "--results", str(results)]
    subprocess.run([*command, "--target", target, *chosen], cwd=ROOT, check=True, timeout=900)
    outcomes = {line["model_type"]: (line["outcome"], line["reason"]) for line in read_results(results).values()}
    assert outcomes == dict.fromkeys(families, ("works", ""))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["openvino", "onnx-runtime"])
def test_decoder_that_the_exporter_refuses_leaves_one_line_and_no_artifact(tmp_path: Path, target: str) -> None:
    (model_class,) = (entry for entry in decoder_classes() if entry.model_type == "deepseek_v32")
    write_model(model_class, tmp_path / "model")
    command = [sys.executable, "-m", "compileflow", "compile", str(tmp_path / "model"), "--target", target]
    completed = subprocess.run(
        [*command, "--task", "text-generation", "--name", "writer"],
        env=os.environ | {"COMPILEFLOW_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert completed.returncode == 1
    (line,) = (line for line in completed.stderr.splitlines() if not line.startswith(("fetch", "compile")))
    assert f"exporter refused {model_class.name}: " in line
    assert "docs/reference/decoders.md" in line
    home = tmp_path / "home"
    assert not list((home / "work").iterdir())
    # The store holds the source model and nothing else.
    assert len(list((home / "store" / "manifests").rglob("*.json"))) == 1
