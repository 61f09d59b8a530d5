"""Inputs for the pipeline of every task, and the comparison of compiled answers with the source model's."""

# ruff: noqa: S101 - the suite is tests.

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compileflow.artifact.open import OpenArtifact
from compileflow.contracts import Arrays
from compileflow.serving.component import LoadedComponent
from compileflow.serving.model import CompiledModel
from compileflow.serving.pipeline import CompiledPipeline
from compileflow.serving.question_answering import QuestionAnsweringPipeline
from compileflow.serving.sentence_embedding import SentenceEmbeddingPipeline
from compileflow.serving.text_ranking import TextRankingPipeline
from compileflow.serving.tokenizer import CompiledTokenizer
from compileflow.source_model.interface import SourceModel
from compileflow.source_model.load import load_config, load_source_model
from compileflow.source_model.tasks import AUTO_CLASSES
from compileflow.spec import HfTask
from compileflow.validation.cases.raw import TRUNCATION
from compileflow.validation.differences import first_difference

SCORE_ATOL = 1e-4
_SETTINGS: Mapping[HfTask, dict[str, Any]] = {
    HfTask.OBJECT_DETECTION: {"threshold": 0.3},
    HfTask.ZERO_SHOT_IMAGE_CLASSIFICATION: {
        "candidate_labels": ["a cat", "dogs", "cars in a wide street", "it was late"]
    },
    HfTask.ZERO_SHOT_CLASSIFICATION: {"candidate_labels": ["travel", "food", "dogs and cats"]},
    # Windows of 0.8 seconds, so that the longest recording exceeds the longest input of the component.
    HfTask.SPEECH_RECOGNITION: {"chunk_length_s": 0.8, "stride_length_s": 0.1},
}
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Numbers of tokens, including special ones: at the edges of the suite's shape buckets, and beyond the maximum.
_TOKENS = (3, 7, 8, 9, 16, 17, 63, 64, 90)
_SAMPLES = (300, 1600, 1601, 4000, 9000, 16_000)
_BEYOND = 40_000


class _EagerRunner:
    """Runs the source model in place of a compiled component."""

    def __init__(self, source: SourceModel):
        self._source = source

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        return self._source.run(inputs)

    def close(self) -> None:
        pass


def assert_pipeline_answers_like_the_source_models(artifact: OpenArtifact, source_dir: Path, task: HfTask) -> None:
    """Compare a compiled pipeline with that of transformers on single inputs, lists, batches and a generator.

    If transformers has no pipeline for the task, the reference is compileflow's pipeline around the source model,
    and if compileflow has none either, the source model itself.
    """
    if task.pipeline_owner is None:
        _assert_model_answers_like_the_source_model(artifact, source_dir, task)
        return
    pipeline = CompiledPipeline.from_pretrained(artifact.folder, task=task, threads=1)
    reference = _reference(artifact, source_dir, task)
    settings = _SETTINGS.get(task, {})
    truncated = {**settings, **TRUNCATION.get(task, {})}
    inputs = questions(task, pipeline)
    expected = [reference(item, **truncated) for item in inputs]
    try:
        for item, answer in zip(inputs, expected, strict=True):
            assert_same_result(pipeline(item, **settings), answer)
        answers = reference(inputs, **truncated)
        assert_same_result(pipeline(inputs, **settings), answers)
        for batch_size in (1, 3):
            assert_same_result(pipeline(inputs, batch_size=batch_size, **settings), answers)
        assert_same_result(pipeline(inputs[:1], **settings), reference(inputs[:1], **truncated))
        streamed = list(pipeline(_stream(inputs), **settings))
        assert_same_result(streamed, list(reference(_stream(inputs), **truncated)))
        assert len(streamed) == len(inputs)
    finally:
        pipeline.model.close()


def _assert_model_answers_like_the_source_model(artifact: OpenArtifact, source_dir: Path, task: HfTask) -> None:
    import torch
    import transformers

    reference = getattr(transformers, AUTO_CLASSES[task]).from_pretrained(source_dir).eval()
    model = CompiledModel.from_pretrained(artifact.folder, threads=1)
    for inputs in _model_inputs(task, source_dir):
        with torch.inference_mode():
            assert_same_result(model(**inputs), reference(**inputs))
    model.close()


def _model_inputs(task: HfTask, source_dir: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the inputs of a model, as its tokenizer or feature extractor prepares them."""
    import transformers

    if task.modality == "text":
        tokenizer = transformers.AutoTokenizer.from_pretrained(source_dir)
        for texts in questions(task, None):
            pairs = [texts[0]] * (len(texts) - 1), texts[1:]
            encoded = tokenizer(*pairs, padding=True, truncation=True, return_tensors="pt")
            yield {name: value[None] for name, value in encoded.items()}
        return
    extractor = transformers.AutoFeatureExtractor.from_pretrained(source_dir)
    for item in questions(task, None):
        yield extractor(item, sampling_rate=extractor.sampling_rate, return_tensors="pt")


def questions(task: HfTask, pipeline: Any) -> list[Any]:
    """Return inputs of a task: at the edges of the shape buckets, beyond the maximum, and unusual ones."""
    if task.modality in ("image", "image-text"):
        # transformers cannot scale the depths of a single pixel.
        return [image for image in _images() if task is not HfTask.DEPTH_ESTIMATION or image.size != (1, 1)]
    if task.modality == "audio":
        random = np.random.default_rng(3)
        samples = {HfTask.SPEECH_RECOGNITION: (*_SAMPLES, _BEYOND), HfTask.AUDIO_XVECTOR: _SAMPLES[1:]}.get(
            task, _SAMPLES
        )
        return [random.standard_normal(count, dtype=np.float32) for count in samples]
    texts = [_text(count) for count in _TOKENS]
    if task is HfTask.FILL_MASK:
        mask = pipeline.tokenizer.mask_token
        return [mask, *(f"{mask} {text}" for text in texts)]
    if task is HfTask.QUESTION_ANSWERING:
        return [{"question": "who was it", "context": text} for text in texts]
    if task is HfTask.MULTIPLE_CHOICE:
        return [["who was it", *texts[start : start + 3]] for start in range(0, len(texts), 2)]
    if task is HfTask.TEXT_RANKING:
        return [("who was it", text) for text in ["", *texts]]
    if task is HfTask.ZERO_SHOT_CLASSIFICATION:
        return texts[:6]
    return ["", *texts, "Zoë 東京 \U0001f600"]


def assert_same_result(candidate: Any, reference: Any, *, atol: float = SCORE_ATOL, rtol: float = 0.0) -> None:
    """Fail unless two answers of models or pipelines are equal; the message names the first difference.

    Types, keys and their order, lengths, shapes and dtypes must be equal, and numbers within the tolerance.

    Args:
        candidate: Answer to check: nested dicts, lists and tuples of numbers, arrays, tensors and texts.
        reference: Expected answer.
        atol: Absolute tolerance of floats.
        rtol: Relative tolerance of floats, a fraction of the reference.

    Raises:
        AssertionError: The answers differ. The message has the path into the answer, the expected value, the value
            found, and the tolerance.
    """
    difference = first_difference(candidate, reference, (atol, rtol), "answer")
    assert difference is None, difference


def _reference(artifact: OpenArtifact, source_dir: Path, task: HfTask) -> Any:
    if task.pipeline_owner == "transformers":
        from transformers import pipeline

        return pipeline(task.value, model=str(source_dir), device="cpu")
    source = load_source_model(source_dir, task)
    record = artifact.component("default").model_copy(update={"dynamic_axes": True, "shape_buckets": ()})
    component = LoadedComponent(replace(artifact), "default", record, _EagerRunner(source))
    model = CompiledModel(component, load_config(source_dir, trust_remote_code=False))
    tokenizer = CompiledTokenizer.from_artifact(artifact)
    if task is HfTask.QUESTION_ANSWERING:
        return QuestionAnsweringPipeline(model, tokenizer)
    if task is HfTask.TEXT_RANKING:
        return TextRankingPipeline(model, tokenizer, artifact.folder)
    return SentenceEmbeddingPipeline(model, tokenizer, artifact.folder)


def _text(tokens: int) -> str:
    """Return a text of single letters that has `tokens` tokens, including two special ones."""
    return " ".join(_LETTERS[number * 7 % 26] for number in range(tokens - 2))


def _images() -> list[Any]:
    from PIL import Image

    random = np.random.default_rng(4)
    return [
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for height, width in ((32, 32), (1, 1), (100, 40), (7, 200), (64, 64))
    ]


def _stream(inputs: list[Any]) -> Iterator[Any]:
    yield from inputs
