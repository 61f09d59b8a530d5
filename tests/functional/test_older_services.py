"""Three services as teams wrote them for the older library: keywords, entities in two languages, sentiment.

Each uses the interface of the older library only, saves its parts below one folder and loads them from there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from torch.utils.data import Dataset

from compileflow import CompiledPipeline, HfTask
from compileflow.testing.pipelines import assert_same_result
from tests.conftest import ModelFactory
from tests.doubles.fixtures import vendor_doubles as vendor_doubles
from tests.models import sentences

# Settings of a compile, as the projects keep them in their configuration.
pytestmark = pytest.mark.usefixtures("file_home")
TRACING = {"dynamic_batch_size": True, "strict": False, "compiler_args": ["--fast-math", "none"]}
TARGETS: dict[str, dict[str, Any]] = {
    "torchscript": {"neuron": False},
    "neuron": {"neuron": True},
    "onnx-runtime": {"target": "onnx-runtime"},
}
TEXTS = [text[:60] for text in sentences()[:7]]
DOCUMENT_TOKENS, WORD_TOKENS, FEATURES = 150, 25, 384


class Texts(Dataset[str]):
    """Hands texts to a pipeline one by one."""

    def __init__(self, texts: list[str]):
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> str:
        return self._texts[index]


class KeywordBackend:
    """Embeds a text as KeyBERT's backend for pipelines does: the mean of the tokens that are not padding."""

    def __init__(self, embedding_model: Any):
        self.embedding_model = embedding_model

    def embed(self, texts: list[str]) -> NDArray[np.float64]:
        features = self.embedding_model(Texts(texts), truncation=True, padding=True)
        return np.array([self._embed(text, values) for text, values in zip(texts, features, strict=True)])

    def _embed(self, text: str, features: Any) -> NDArray[np.float64]:
        token_embeddings = np.array(features)
        tokenized = self.embedding_model.tokenizer(text, truncation=True, padding=True, return_tensors="np")
        mask = np.broadcast_to(np.expand_dims(tokenized["attention_mask"], -1), token_embeddings.shape)
        mean = np.sum(token_embeddings * mask, 1) / np.clip(mask.sum(1), 1e-9, None)
        return np.asarray(mean[0] / np.linalg.norm(mean[0]))


class KeywordService:
    """Ranks candidates by their similarity to a document. Documents and words have pipelines of two lengths."""

    def __init__(self, document_pipeline: Any, word_pipeline: Any):
        self.document_backend = KeywordBackend(document_pipeline)
        self.word_backend = KeywordBackend(word_pipeline)

    def __call__(self, document: str, candidates: list[str]) -> list[tuple[str, float]]:
        similarities = self.word_backend.embed(candidates) @ self.document_backend.embed([document])[0]
        ranked = sorted(zip(candidates, similarities, strict=True), key=lambda pair: -pair[1])
        return [(word, round(float(similarity), 4)) for word, similarity in ranked]

    def save_pretrained(self, directory: str) -> None:
        self.word_backend.embedding_model.save_pretrained(os.path.join(directory, "compiled_word_pipeline"))
        self.document_backend.embedding_model.save_pretrained(
            os.path.join(directory, "compiled_document_pipeline")
        )

    @classmethod
    def from_pretrained(cls, directory: str) -> Self:
        names = ("compiled_document_pipeline", "compiled_word_pipeline")
        return cls(*(CompiledPipeline.from_pretrained(os.path.join(directory, name)) for name in names))


class EntityService:
    """Finds entities with the pipeline of a language, and classes of tokens with its tokenizer and model."""

    def __init__(self, base: Any, kj: Any):
        self.base, self.kj = base, kj

    def pipeline_for(self, language: str) -> Any:
        return self.kj if language in ("ko", "ja") else self.base

    def entities(self, texts: list[str], language: str) -> list[list[dict[str, Any]]]:
        found = self.pipeline_for(language)(texts)
        for entities in found:
            for entity in entities:
                entity.pop("index")
                entity["entity_type"] = entity.pop("entity")
        return list(found)

    def token_classes(self, texts: list[str], language: str) -> list[list[tuple[str, int]]]:
        pipeline = self.pipeline_for(language)
        inputs = pipeline.tokenizer(
            texts,
            padding="max_length",
            max_length=99,
            truncation=True,
            return_tensors="pt",
            return_offsets_mapping=True,
        )
        assert inputs["offset_mapping"].shape == (*inputs["input_ids"].shape, 2)
        classes = pipeline.model.forward(inputs["input_ids"], inputs["attention_mask"])[0].argmax(2)
        return [
            [(token, int(label)) for token, label in zip(inputs.tokens(row), classes[row], strict=True)]
            for row in range(len(texts))
        ]

    def save_pretrained(self, directory: str) -> None:
        self.base.save_pretrained(os.path.join(directory, "compiled_ner_pipeline_base"))
        self.kj.save_pretrained(os.path.join(directory, "compiled_ner_pipeline_kj"))

    @classmethod
    def from_pretrained(cls, directory: str) -> Self:
        names = ("compiled_ner_pipeline_base", "compiled_ner_pipeline_kj")
        return cls(*(CompiledPipeline.from_pretrained(os.path.join(directory, name)) for name in names))


class SentimentService:
    """Computes probabilities from the logits of whole batches."""

    def __init__(self, compiled_sent_pipeline: Any):
        self.compiled_sent_pipeline = compiled_sent_pipeline
        specs = compiled_sent_pipeline.compiled_pipeline.model.compilation_specs
        self.max_length, self.max_batch = specs["tracing__max_length"], specs["tracing__batch_size"]

    def __call__(self, texts: list[str]) -> NDArray[np.float64]:
        inputs = self.compiled_sent_pipeline.tokenizer(texts, return_tensors="pt")
        assert inputs["input_ids"].shape == (len(texts), self.max_length)
        result = self.compiled_sent_pipeline.model(**inputs)
        logits = np.exp(result["logits"].clone().detach().numpy().astype(float))
        return np.asarray(logits / logits.sum(axis=1, keepdims=True))

    def save_pretrained(self, directory: str) -> None:
        self.compiled_sent_pipeline.save_pretrained(os.path.join(directory, "compiled_sent_pipeline"))

    @classmethod
    def from_pretrained(cls, directory: str) -> Self:
        return cls(CompiledPipeline.from_pretrained(os.path.join(directory, "compiled_sent_pipeline")))


class Compile(Protocol):
    """Compiles a pipeline for the target of a test."""

    def __call__(self, pipeline: Any, max_length: int, batch_size: int = 1) -> CompiledPipeline: ...


@pytest.fixture(
    params=[pytest.param(name, marks=[pytest.mark.slow] * (name == "onnx-runtime")) for name in TARGETS]
)
def compile_it(request: pytest.FixtureRequest) -> Compile:
    if request.param == "neuron":
        request.getfixturevalue("vendor_doubles")

    def compile_it(pipeline: Any, max_length: int, batch_size: int = 1) -> CompiledPipeline:
        return CompiledPipeline.from_pipeline(
            pipeline=pipeline,
            max_length=max_length,
            batch_size=batch_size,
            validate_compilation=True,
            validation_rtol=1e-2,
            validation_atol=1e-2,
            tokenizer_settings={"add_special_tokens": True},
            model_tracing_settings=TRACING,
            **TARGETS[request.param],
        )

    return compile_it


@pytest.fixture(scope="module")
def embedder(tiny_model: ModelFactory) -> Any:
    """A feature-extraction pipeline with the size of all-MiniLM-L6-v2's features and one layer."""
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model(HfTask.FEATURE_EXTRACTION))
    tokenizer.model_max_length = 160
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=FEATURES,
        num_hidden_layers=1,
        num_attention_heads=12,
        intermediate_size=64,
        max_position_embeddings=160,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = transformers.BertModel(config).eval()
    return transformers.pipeline("feature-extraction", model=model, tokenizer=tokenizer)


def before_and_after(service: Any, folder: Path) -> Iterator[Any]:
    """Yield a service, and the one that its saved folder gives; saving twice changes nothing."""
    service.save_pretrained(str(folder))
    service.save_pretrained(str(folder))
    yield service
    yield type(service).from_pretrained(str(folder))


def loaded(tiny_model: ModelFactory, alias: str, architecture: str) -> Any:
    folder = str(tiny_model(HfTask(alias), architecture))
    return transformers.pipeline(alias, model=folder, device="cpu")


def test_keywords_are_pooled_with_the_mask_of_the_padded_features(
    embedder: Any, compile_it: Compile, tmp_path: Path
) -> None:
    service = KeywordService(compile_it(embedder, DOCUMENT_TOKENS), compile_it(embedder, WORD_TOKENS))
    document, candidates = " ".join(TEXTS[:4]), ["order", "time", "nobody answered", "the street"]
    expected = KeywordService(embedder, embedder)(document, candidates)

    for item in before_and_after(service, tmp_path):
        pipeline = item.document_backend.embedding_model
        (features,) = pipeline(Texts([document]), truncation=True, padding=True)
        assert np.array(features).shape == (1, DOCUMENT_TOKENS, FEATURES)
        tokenized = pipeline.tokenizer(document, truncation=True, padding=True, return_tensors="np")
        assert tokenized["attention_mask"].shape == (1, DOCUMENT_TOKENS)
        assert item(document, candidates) == [(word, pytest.approx(score, abs=1e-3)) for word, score in expected]


def test_entities_of_two_languages(tiny_model: ModelFactory, compile_it: Compile, tmp_path: Path) -> None:
    base, kj = loaded(tiny_model, "ner", "bert"), loaded(tiny_model, "ner", "distilbert")
    service = EntityService(compile_it(base, 32, 6), compile_it(kj, 32, 6))
    reference = EntityService(base, kj)
    # transformers' own pipeline does not truncate at the compiled length.
    texts = [text[:20] for text in TEXTS]

    for item in before_and_after(service, tmp_path):
        for language in ("en", "ja"):
            original = item.pipeline_for(language).original_pipeline
            assert item.pipeline_for(language).original_pipeline_task == "ner"
            assert_same_result(item.entities(texts, language), reference.entities(texts, language))
            classes = item.token_classes(texts, language)
            encoded = original.tokenizer(
                texts, padding="max_length", truncation=True, max_length=32, return_tensors="pt"
            )
            with torch.no_grad():
                logits = original.model(encoded["input_ids"], encoded["attention_mask"]).logits
            counted = encoded["attention_mask"].bool()
            labels = torch.tensor([[label for _, label in row] for row in classes])
            assert torch.equal(labels[counted], logits.argmax(2)[counted])


def test_sentiment_of_any_number_of_texts(tiny_model: ModelFactory, compile_it: Compile, tmp_path: Path) -> None:
    original = loaded(tiny_model, "sentiment-analysis", "roberta")
    service = SentimentService(compile_it(original, 32, 6))
    encoded = original.tokenizer(TEXTS, padding=True, truncation=True, max_length=32, return_tensors="pt")
    with torch.no_grad():
        expected = original.model(**encoded).logits.softmax(1).numpy()

    for item in before_and_after(service, tmp_path):
        assert (item.max_length, item.max_batch) == (32, 6)
        np.testing.assert_allclose(item(TEXTS), expected, atol=1e-3)
        np.testing.assert_allclose(item(TEXTS[:1]), expected[:1], atol=1e-3)
        assert item.compiled_sent_pipeline.original_pipeline_task == "sentiment-analysis"
        answers = item.compiled_sent_pipeline(TEXTS)
        assert [answer["label"] for answer in answers] == [
            original.model.config.id2label[int(row.argmax())] for row in expected
        ]
