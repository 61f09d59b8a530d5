"""What the conformance suite asks a compiled pipeline, and what it must answer: what transformers' own answers."""

# ruff: noqa: S101 - the suite is tests.

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from compileflow.artifact.open import OpenArtifact
from compileflow.contracts import Arrays
from compileflow.serving.component import LoadedComponent
from compileflow.serving.model import CompiledModel
from compileflow.serving.pipeline import CompiledPipeline
from compileflow.serving.question_answering import QuestionAnsweringPipeline
from compileflow.serving.sentence_embedding import SentenceEmbeddingPipeline
from compileflow.serving.tokenizer import CompiledTokenizer
from compileflow.source_model.interface import SourceModel
from compileflow.source_model.load import load_config, load_source_model
from compileflow.spec import HfTask

SCORE_ATOL = 1e-4
# A compiled pipeline truncates unasked; transformers' own have three ways of being asked.
_TRUNCATED: Mapping[HfTask, dict[str, Any]] = {
    HfTask.FEATURE_EXTRACTION: {"truncation": True},
    HfTask.TEXT_CLASSIFICATION: {"truncation": True},
    HfTask.FILL_MASK: {"tokenizer_kwargs": {"truncation": True}},
}
_SETTINGS: Mapping[HfTask, dict[str, Any]] = {
    HfTask.ZERO_SHOT_CLASSIFICATION: {"candidate_labels": ["travel", "food", "dogs and cats"]},
    # Windows of 0.8 seconds, so that the longest recording is longer than what a graph takes.
    HfTask.SPEECH_RECOGNITION: {"chunk_length_s": 0.8, "stride_length_s": 0.1},
}
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Tokens, special ones included: around the edges of the suite's shape buckets, and beyond the maximum.
_TOKENS = (3, 7, 8, 9, 16, 17, 63, 64, 90)
_SAMPLES = (300, 1600, 1601, 4000, 9000, 16_000)
_BEYOND = 40_000


class _EagerRunner:
    """The source model in the place of a compiled graph."""

    def __init__(self, source: SourceModel):
        self._source = source

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        return self._source.run(inputs)

    def close(self) -> None:
        pass


def assert_pipeline_answers_like_the_source_models(artifact: OpenArtifact, source_dir: Path, task: HfTask) -> None:
    """Compare a compiled pipeline with transformers' own, on single inputs, lists, batches and a generator.

    Where transformers has no pipeline for the task, it is compileflow's own around the source model itself.
    """
    pipeline = CompiledPipeline.from_pretrained(artifact.folder, task=task, threads=1)
    reference = _reference(artifact, source_dir, task)
    settings = _SETTINGS.get(task, {})
    truncated = settings | _TRUNCATED.get(task, {})
    asked = questions(task, pipeline)
    expected = [reference(each, **truncated) for each in asked]
    try:
        for each, answer in zip(asked, expected, strict=True):
            assert_same_result(pipeline(each, **settings), answer)
        whole = reference(asked, **truncated)
        assert_same_result(pipeline(asked, **settings), whole)
        for batch_size in (1, 3):
            assert_same_result(pipeline(asked, batch_size=batch_size, **settings), whole)
        assert_same_result(pipeline(asked[:1], **settings), reference(asked[:1], **truncated))
        streamed = list(pipeline(_stream(asked), **settings))
        assert_same_result(streamed, list(reference(_stream(asked), **truncated)))
        assert len(streamed) == len(asked)
    finally:
        pipeline.model.close()


def questions(task: HfTask, pipeline: Any) -> list[Any]:
    """Return inputs of a task: edges of the shape buckets and beyond the maximum, odd ones between them."""
    if task.modality == "image":
        return _images()
    if task.modality == "audio":
        random = np.random.default_rng(3)
        samples = (*_SAMPLES, _BEYOND) if task is HfTask.SPEECH_RECOGNITION else _SAMPLES
        return [random.standard_normal(count, dtype=np.float32) for count in samples]
    texts = [_text(count) for count in _TOKENS]
    if task is HfTask.FILL_MASK:
        mask = pipeline.tokenizer.mask_token
        return [mask, *(f"{mask} {text}" for text in texts)]
    if task is HfTask.QUESTION_ANSWERING:
        return [{"question": "who was it", "context": text} for text in texts]
    if task is HfTask.ZERO_SHOT_CLASSIFICATION:
        return texts[:6]
    return ["", *texts, "Zoë 東京 \U0001f600"]


def assert_same_result(candidate: Any, reference: Any) -> None:
    """Compare what pipelines return: floats within the score's tolerance, all else equal."""
    assert type(candidate) is type(reference)
    if isinstance(reference, dict):
        assert list(candidate) == list(reference)
        for name, value in reference.items():
            assert_same_result(candidate[name], value)
    elif isinstance(reference, list):
        assert len(candidate) == len(reference)
        for one, other in zip(candidate, reference, strict=True):
            assert_same_result(one, other)
    elif isinstance(reference, np.ndarray) or hasattr(reference, "detach"):
        np.testing.assert_allclose(candidate, reference, rtol=0, atol=SCORE_ATOL)
    elif isinstance(reference, float | np.floating):
        assert candidate == pytest.approx(reference, abs=SCORE_ATOL)
    else:
        assert candidate == reference


def _reference(artifact: OpenArtifact, source_dir: Path, task: HfTask) -> Any:
    if task not in (HfTask.QUESTION_ANSWERING, HfTask.SENTENCE_SIMILARITY):
        from transformers import pipeline

        return pipeline(task.value, model=str(source_dir), device="cpu")
    source = load_source_model(source_dir, task)
    record = artifact.component("default").model_copy(update={"dynamic_axes": True, "shape_buckets": ()})
    graph = LoadedComponent(replace(artifact), "default", record, _EagerRunner(source))
    model = CompiledModel(graph, load_config(source_dir, trust_remote_code=False))
    tokenizer = CompiledTokenizer.from_artifact(artifact)
    if task is HfTask.QUESTION_ANSWERING:
        return QuestionAnsweringPipeline(model, tokenizer)
    return SentenceEmbeddingPipeline(model, tokenizer, artifact.folder)


def _text(tokens: int) -> str:
    """Return a text whose letters are a token each, with two special ones around it."""
    return " ".join(_LETTERS[number * 7 % 26] for number in range(tokens - 2))


def _images() -> list[Any]:
    from PIL import Image

    random = np.random.default_rng(4)
    return [
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for height, width in ((32, 32), (1, 1), (100, 40), (7, 200), (64, 64))
    ]


def _stream(asked: list[Any]) -> Iterator[Any]:
    yield from asked
