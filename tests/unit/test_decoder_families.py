"""Decoders of many families write, once they are compiled, what transformers writes, token by token."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import transformers

from compileflow import CompiledModel
from tests.decoders import GREEDY, TASK, TEXTS
from tests.in_process import InProcess
from tests.models import build_decoder

# Each family, with the fields of its configuration that a small model needs.
FAMILIES: dict[str, dict[str, Any]] = {
    "cohere": {},
    "falcon": {"multi_query": True, "new_decoder_architecture": False, "alibi": False},
    "gemma": {"head_dim": 16},
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neox": {},
    "gptj": {"rotary_dim": 8},
    "mistral": {"sliding_window": 16},
    "olmo": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "stablelm": {"partial_rotary_factor": 0.5},
    "starcoder2": {},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "target"),
    [
        *product(FAMILIES, ("openvino", "onnx-runtime")),
        # A window, no positions as an input, and keys and values of one head. Each compile takes half a minute.
        *product(("gemma3_text", "opt", "gpt_bigcode"), ("aot-inductor",)),
    ],
)
def test_rows_of_a_padded_batch_go_on_as_in_transformers(
    in_process: InProcess, tmp_path: Path, family: str, target: str
) -> None:
    source_dir = build_decoder(tmp_path / "source", model_type=family, **FAMILIES[family])
    artifact_dir = in_process.compile(source_dir, tmp_path / "artifact", target=target, hf_task=TASK)
    model = CompiledModel.from_pretrained(artifact_dir, threads=1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source_dir, padding_side="left")
    inputs = tokenizer(TEXTS, return_tensors="pt", padding=True)
    eager = transformers.AutoModelForCausalLM.from_pretrained(source_dir).eval()
    settings = GREEDY | {"max_new_tokens": 24}
    assert model.generate(**inputs, **settings).tolist() == eager.generate(**inputs, **settings).tolist()
