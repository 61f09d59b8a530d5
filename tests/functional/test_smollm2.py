"""SmolLM2-135M-Instruct from its GGUF file: its answers beside those of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from compileflow import CompiledModel, CompiledPipeline, CompiledTokenizer
from tests.smollm2 import SmolLM2

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
TEXTS = ["The capital of France is", "Once upon a time, there was a small", "2 + 2 ="]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def eager(smollm2: SmolLM2) -> Any:
    """The source model, loaded with transformers itself."""
    return transformers.AutoModelForCausalLM.from_pretrained(smollm2.folder).eval()


@pytest.mark.parametrize("target", ["openvino", "onnx-runtime"])
def test_answers_are_those_of_transformers(smollm2: SmolLM2, eager: Any, target: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2.folder, padding_side="left")
    reference = transformers.pipeline("text-generation", model=eager, tokenizer=tokenizer)
    write = CompiledPipeline.from_pretrained(smollm2.compiled(target), threads=1)
    for settings in ({"do_sample": False}, {"do_sample": False, "num_beams": 2}):
        answer = write(QUESTION, max_new_tokens=10, **settings)
        assert "Paris" in answer[0]["generated_text"][-1]["content"]
        assert answer == reference(QUESTION, max_new_tokens=10, **settings)
    inputs = tokenizer(TEXTS, return_tensors="pt", padding=True)
    assert CompiledTokenizer.from_pretrained(smollm2.compiled(target))(TEXTS, padding=True)["input_ids"] == (
        inputs["input_ids"].tolist()
    )
    model = CompiledModel.from_pretrained(smollm2.compiled(target), threads=1)
    written = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert written.tolist() == eager.generate(**inputs, max_new_tokens=12, do_sample=False).tolist()
