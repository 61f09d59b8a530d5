"""SmolLM2-135M-Instruct, from its GGUF file to a verdict, and its answers beside those of transformers."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import transformers

from compileflow import CompiledModel, CompiledPipeline, CompiledTokenizer
from compileflow.settings import Settings
from compileflow.sources import gguf_file
from compileflow.testing.shared import make_once, shared_folder
from tests.decoders import TASK
from tests.in_process import InProcess
from tests.smollm2 import gguf_of_smollm2
from tests.unit.proving import validate_here

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
TEXTS = ["The capital of France is", "Once upon a time, there was a small", "2 + 2 ="]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as an ordinary folder, converted as the fetch step does."""

    def convert(folder: Path) -> None:
        gguf_file.convert_gguf(gguf_of_smollm2(), folder / "model", Settings(home_dir=folder / "home"))

    return make_once(shared_folder(tmp_path_factory) / "smollm2", convert) / "model"


@pytest.fixture(scope="session")
def artifact(smollm2: Path, in_process: InProcess, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Compile the model once a run: `artifact(target)` gives a folder."""

    def compiled(target: str) -> Path:
        folder = shared_folder(tmp_path_factory) / f"smollm2-{target}"
        return (
            make_once(
                folder,
                lambda made: in_process.compile(smollm2, made / "artifact", target=target, hf_task=TASK),
            )
            / "artifact"
        )

    return cache(compiled)


@pytest.fixture(scope="session")
def eager(smollm2: Path) -> Any:
    """The source model, loaded with transformers itself."""
    return transformers.AutoModelForCausalLM.from_pretrained(smollm2).eval()


@pytest.mark.parametrize("target", ["openvino", "onnx-runtime"])
def test_answers_are_those_of_transformers(artifact: Any, eager: Any, smollm2: Path, target: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2, padding_side="left")
    reference = transformers.pipeline("text-generation", model=eager, tokenizer=tokenizer)
    write = CompiledPipeline.from_pretrained(artifact(target), threads=1)
    for settings in ({"do_sample": False}, {"do_sample": False, "num_beams": 2}):
        answer = write(QUESTION, max_new_tokens=10, **settings)
        assert "Paris" in answer[0]["generated_text"][-1]["content"]
        assert answer == reference(QUESTION, max_new_tokens=10, **settings)
    inputs = tokenizer(TEXTS, return_tensors="pt", padding=True)
    assert CompiledTokenizer.from_pretrained(artifact(target))(TEXTS, padding=True)["input_ids"] == (
        inputs["input_ids"].tolist()
    )
    model = CompiledModel.from_pretrained(artifact(target), threads=1)
    written = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert written.tolist() == eager.generate(**inputs, max_new_tokens=12, do_sample=False).tolist()


def test_verdict_at_fp32_is_pass(artifact: Any, smollm2: Path, tmp_path: Path) -> None:
    proof = validate_here(smollm2, artifact("openvino"), tmp_path / "report", max_examples=8)
    assert (proof.outcome, proof.reason) == ("pass", "all 23 gates hold")
    assert proof.gate("generations")["measured"] == 0
