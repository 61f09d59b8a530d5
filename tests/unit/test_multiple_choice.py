"""Multiple choice: a compiled model answers as the source model's class does, for any number of choices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import compileflow
from compileflow import CompiledModel, HfTask
from compileflow.errors import InputError, LoadError
from compileflow.local.optimized_model import as_source_class
from compileflow.testing.pipelines import assert_same_result
from compileflow.testing.targets import compiled_folder
from tests.models import sentences
from tests.steps import Pipeline

TASK = HfTask.MULTIPLE_CHOICE
CHOICES = sentences()[:4]


def source_class(folder: Path) -> Any:
    return transformers.AutoModelForMultipleChoice.from_pretrained(folder).eval()


def questions(folder: Path, count: int, choices: int) -> dict[str, torch.Tensor]:
    """Return tensors of shape (count, choices, tokens)."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [sentences()[20 + number] for number in range(count)]
    encoded = tokenizer(
        [text for text in texts for _ in range(choices)],
        CHOICES[:choices] * count,
        padding=True,
        truncation=True,
        return_tensors="pt",
    )
    return {name: value.view(count, choices, -1) for name, value in encoded.items()}


@pytest.mark.parametrize("architecture", ["bert", "distilbert"])
def test_compiled_model_answers_as_the_class_does(
    tiny_model: Callable[..., Path], architecture: str, tmp_path: Path
) -> None:
    folder = tiny_model(TASK, architecture)
    model = CompiledModel.from_pretrained(compiled_folder(folder, "torchscript", TASK, tmp_path))
    source = source_class(folder)

    for count, choices in ((1, 4), (3, 2), (2, 1)):
        inputs = questions(folder, count, choices)
        with torch.inference_mode():
            expected = source(**inputs)
        assert_same_result(model(**inputs), expected, atol=1e-5)
        assert expected.logits.shape == (count, choices)
        by_position = [inputs[record.name] for record in model.graph.record.inputs]
        assert_same_result(model(*by_position, return_dict=False)[0], expected.logits, atol=1e-5)


def test_inputs_without_an_axis_of_choices_are_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model(TASK)
    artifact = compiled_folder(folder, "torchscript", TASK, tmp_path)
    model = CompiledModel.from_pretrained(artifact)

    with pytest.raises(
        InputError, match=r"input_ids: expected shape \(batch, choices, sequence\), got shape \(1, 3\)"
    ):
        model(torch.ones(1, 3, dtype=torch.int64))
    with pytest.raises(LoadError, match="no pipeline for multiple-choice"):
        compileflow.CompiledPipeline.from_pretrained(artifact)


def test_multiple_choice_passes_and_is_registered(tiny_model: Callable[..., Path], pipeline: Pipeline) -> None:
    folder = tiny_model(TASK)
    request = pipeline.request(folder, name="quiz")

    version = pipeline.run(request)
    inputs = questions(folder, 2, 3)
    with torch.inference_mode():
        expected = source_class(folder)(**inputs)

    assert version.spec["hf_task"] == TASK
    model = CompiledModel.from_pretrained(pipeline.compile(request).uri)
    assert_same_result(model(**inputs), expected, atol=1e-5)


def test_model_in_memory_is_compiled_and_compared(
    tiny_model: Callable[..., Path], settings: Any, in_process: Any
) -> None:
    source = source_class(tiny_model(TASK))
    with in_process.instead_of_children():
        model = CompiledModel.from_model(source, batch_size=2, max_length=16, neuron=False)
    inputs = {name: torch.randint(5, 90, (2, 3, 9)) for name in ("input_ids",)}

    with torch.inference_mode():
        expected = source(**inputs)
    assert_same_result(model(**inputs), expected, atol=1e-5)
    optimized = as_source_class(model)
    assert isinstance(optimized, transformers.BertForMultipleChoice)
    assert_same_result(optimized(**inputs), expected, atol=1e-5)
