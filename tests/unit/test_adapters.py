"""`compileflow.pipeline` and `compileflow.optimize`: called like transformers, compiled once, proven."""

from __future__ import annotations

import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import compileflow
from compileflow import CompiledPipeline, HfTask
from compileflow.errors import InputError, LoadError, SpecError, TargetUnavailableError, VerdictError
from compileflow.local.api import LOCAL_TARGETS, local_target
from compileflow.settings import Settings, get_settings
from compileflow.source_model.tasks import AUTO_CLASSES
from compileflow.spec import Precision
from compileflow.testing.targets import hide_distributions
from compileflow.validation.settings import ValidationSettings
from tests.conftest import ModelFactory
from tests.hub_server import Hub
from tests.models import LABELS, sentences
from tests.steps import Pipeline

# Short enough for the compiled shape: transformers' own pipeline truncates at the model's maximum.
TEXTS = [text[:40] for text in sentences()[:5]]
TASK = HfTask.TEXT_CLASSIFICATION
SHAPES = ({"batch_size": 2, "sequence_length": 32},)
QUICK = ValidationSettings(latency_pairs=5, max_examples=16)
SMALL: dict[str, Any] = {"target": "torchscript", "shape_buckets": SHAPES, "validate": False}


def scores(answers: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    return [(answer["label"], pytest.approx(answer["score"], abs=1e-4)) for answer in answers]


def load_source(folder: Path, hf_task: HfTask = TASK) -> Any:
    return getattr(transformers, AUTO_CLASSES[hf_task]).from_pretrained(folder).eval()


class TestPipeline:
    def test_answers_like_transformers_and_the_second_call_only_loads(
        self, pipeline: Pipeline, tiny_model: ModelFactory, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder = tiny_model(TASK)
        arguments = SMALL | {"validate": QUICK, "top_k": 1}
        reference = transformers.pipeline(TASK.value, model=str(folder), top_k=1)
        caplog.set_level(logging.INFO, logger="compileflow")

        first = compileflow.pipeline("text-classification", str(folder), **arguments)
        assert pipeline.counts == {"compile": 1, "validate": 1}
        assert "compiled in" in caplog.text
        second = compileflow.pipeline("sentiment-analysis", folder, device=-1, **arguments)

        assert pipeline.counts == {"compile": 1, "validate": 1}
        assert "cached, every part of its key is unchanged" in caplog.text
        for pipeline in (first, second):
            assert isinstance(pipeline, CompiledPipeline)
            answers = [answer for (answer,) in pipeline(TEXTS)]
            assert scores(answers) == [(a["label"], a["score"]) for (a,) in reference(TEXTS)]

    def test_task_alone_takes_transformers_default_model(
        self, hub: Hub, pipeline: Pipeline, tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tiny_model(HfTask.TOKEN_CLASSIFICATION)
        name, revision = transformers.pipelines.SUPPORTED_TASKS["token-classification"]["default"]["model"]
        hub.add(name, {path.name: path.read_bytes() for path in folder.iterdir()}, branch=revision)
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        get_settings.cache_clear()

        pipeline = compileflow.pipeline("ner", **SMALL)

        assert pipeline.task == "token-classification"
        assert {entity["entity"] for entity in pipeline(TEXTS[0])} <= set(LABELS[HfTask.TOKEN_CLASSIFICATION])
        assert any(path == "model.safetensors" for _, path in hub.downloaded())

    def test_model_alone_serves_its_own_task(self, pipeline: Pipeline, tiny_model: ModelFactory) -> None:
        pipeline = compileflow.pipeline(model=str(tiny_model(HfTask.FILL_MASK)), **SMALL)

        assert pipeline.task == "fill-mask"
        assert len(pipeline("the [MASK] is here")) == 5

    def test_model_in_memory_is_compiled_once_with_its_tokenizer(
        self, pipeline: Pipeline, tiny_model: ModelFactory
    ) -> None:
        folder = tiny_model(TASK)
        model, tokenizer = load_source(folder), transformers.AutoTokenizer.from_pretrained(folder)
        reference = transformers.pipeline(TASK.value, model=model, tokenizer=tokenizer)

        first = compileflow.pipeline(model=model, tokenizer=tokenizer, **SMALL)
        tokenizer(TEXTS, padding=True, truncation=True, max_length=7)
        second = compileflow.pipeline(model=model, tokenizer=tokenizer, **SMALL)

        assert pipeline.counts["compile"] == 1
        for pipeline in (first, second):
            assert scores(pipeline(TEXTS)) == [(a["label"], a["score"]) for a in reference(TEXTS)]
        model.name_or_path = model.config.name_or_path = ""
        with pytest.raises(SpecError, match=r"in memory has no tokenizer.*tokenizer="):
            compileflow.pipeline(model=model, **SMALL)

    def test_tokenizer_that_is_given_replaces_the_models(
        self, pipeline: Pipeline, tiny_model: ModelFactory
    ) -> None:
        folder = tiny_model(TASK)
        other_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        other_tokenizer.padding_side = "left"

        pipeline_with_tokenizer = compileflow.pipeline(model=str(folder), tokenizer=other_tokenizer, **SMALL)
        named_twice = compileflow.pipeline(model=str(folder), tokenizer=str(folder), **SMALL)

        assert pipeline_with_tokenizer.tokenizer.padding_side == "left"
        assert named_twice.tokenizer.padding_side == "right"

    def test_artifact_that_fails_its_gates_is_refused_unless_unproven_is_asked_for(
        self, pipeline: Pipeline, tiny_model: ModelFactory
    ) -> None:
        folder = str(tiny_model(TASK))
        # No graph is a million times as fast.
        strict = QUICK.model_copy(update={"max_latency_ratio": 1e-6})

        with pytest.raises(VerdictError, match=r"for torchscript, failed validation: fail: .*latency") as caught:
            compileflow.pipeline(model=folder, **SMALL | {"validate": strict})
        assert "validate=False" in caught.value.hint
        assert len(compileflow.pipeline(model=folder, **SMALL)(TEXTS)) == len(TEXTS)

    @pytest.mark.parametrize("adapter", [compileflow.pipeline, compileflow.optimize])
    def test_what_cannot_be_meant_is_refused(
        self, settings: Settings, tiny_model: ModelFactory, adapter: Any
    ) -> None:
        folder = str(tiny_model(TASK))

        with pytest.raises(ValueError, match="Both task and model are missing"):
            adapter()
        with pytest.raises(
            SpecError, match=r"not compile the task 'classify'.*text-classification.*sentiment-analysis"
        ):
            adapter("classify", folder)
        with pytest.raises(SpecError, match=r"no default model for sentence-similarity"):
            adapter("sentence-similarity")
        with pytest.raises(SpecError, match=r"Unknown target 'torchscrip'"):
            adapter(model=folder, target="torchscrip")
        with pytest.raises(SpecError, match=r"precision: .*got 'fp12'"):
            adapter(model=folder, precision="fp12")

    @pytest.mark.parametrize(
        ("wrong", "says"),
        [
            ({"precison": "int8"}, "Unknown argument 'precison'. Did you mean precision?"),
            ({"max_sequence_len": 8}, "Unknown argument 'max_sequence_len'. Did you mean max_sequence_length?"),
            ({"foo": 1}, "The pipeline of text-classification has no setting 'foo'. Leave it out."),
            ({"topk": 1}, "The pipeline of text-classification has no setting 'topk'. Did you mean top_k?"),
        ],
    )
    def test_setting_that_nothing_knows_is_refused_before_the_compile(
        self, pipeline: Pipeline, tiny_model: ModelFactory, wrong: dict[str, Any], says: str
    ) -> None:
        with pytest.raises(SpecError) as caught:
            compileflow.pipeline(model=str(tiny_model(TASK)), **SMALL, **wrong)
        assert str(caught.value) == says
        assert pipeline.counts["compile"] == 0

    def test_device_that_is_not_the_targets_is_refused(self, settings: Settings, tiny_model: ModelFactory) -> None:
        with pytest.raises(LoadError, match="from the CPU, got device='cuda:0'"):
            compileflow.pipeline(model=str(tiny_model(TASK)), device="cuda:0")


class TestAutoLocal:
    def test_first_target_that_can_is_taken_and_said(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, logger="compileflow")
        hide_distributions(monkeypatch, "openvino")

        assert local_target(TASK, Precision.FP32) == "onnx-runtime"
        assert "auto-local selects onnx-runtime (skipped: openvino:" in caplog.text

    def test_none_says_what_each_lacks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        hide_distributions(monkeypatch)

        with pytest.raises(TargetUnavailableError) as caught:
            local_target(TASK, Precision.FP32)
        assert all(f"{name}: " in caught.value.message for name in LOCAL_TARGETS)

    @pytest.mark.slow
    def test_default_target_serves(self, pipeline: Pipeline, tiny_model: ModelFactory) -> None:
        folder = tiny_model(TASK)
        pipeline = compileflow.pipeline(model=folder, validate=QUICK)

        assert pipeline.model.manifest.target.name == local_target(TASK, Precision.FP32)
        reference = transformers.pipeline(TASK.value, model=str(folder))
        assert scores(pipeline(TEXTS)) == [(a["label"], a["score"]) for a in reference(TEXTS)]


class TestOptimize:
    @pytest.fixture
    def source(self, tiny_model: ModelFactory) -> Any:
        return load_source(tiny_model(TASK))

    @pytest.fixture
    def optimized(self, pipeline: Pipeline, tiny_model: ModelFactory) -> Any:
        return compileflow.optimize(model=tiny_model(TASK), **SMALL)

    @pytest.fixture
    def encoded(self, tiny_model: ModelFactory) -> Any:
        tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model(TASK))
        pairs = list(pairwise(TEXTS[:4]))
        return tokenizer(pairs, padding=True, truncation=True, max_length=32, return_tensors="pt")

    def test_is_an_instance_of_its_source_class_and_answers_like_it(
        self, optimized: Any, source: Any, encoded: Any
    ) -> None:
        assert isinstance(optimized, transformers.BertForSequenceClassification)
        assert isinstance(optimized, torch.nn.Module)
        with torch.no_grad():
            expected = source(**encoded)
            by_name = optimized(**encoded)
            by_position = optimized(encoded["input_ids"], encoded["attention_mask"], encoded["token_type_ids"])
            as_tuple = optimized(**encoded, return_dict=False)

        for answer in (by_name, by_position):
            assert type(answer) is type(expected)
            assert list(answer) == list(expected)
            torch.testing.assert_close(answer.logits, expected.logits, atol=1e-5, rtol=0)
        assert type(as_tuple) is tuple
        assert torch.equal(as_tuple[0], by_name.logits)

    def test_has_what_callers_of_a_model_look_at(self, optimized: Any, source: Any) -> None:
        assert optimized.config.to_json_string() == source.config.to_json_string()
        assert type(optimized).__name__ == type(source).__name__
        assert optimized.num_labels == 3
        assert optimized.device == torch.device("cpu")
        assert optimized.dtype is torch.float32
        assert not optimized.training
        assert optimized.eval() is optimized.train(False) is optimized.to("cpu") is optimized.to(torch.float32)
        assert list(optimized.parameters()) == []
        assert not optimized.can_generate()
        assert repr(optimized) == "BertForSequenceClassification(compiled for torchscript)"

    def test_serves_in_transformers_own_pipeline(
        self, optimized: Any, source: Any, tiny_model: ModelFactory
    ) -> None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model(TASK))
        reference_pipeline = transformers.pipeline(TASK.value, model=optimized, tokenizer=tokenizer, device=-1)
        reference = transformers.pipeline(TASK.value, model=source, tokenizer=tokenizer, device=-1)

        assert scores(reference_pipeline(TEXTS)) == [(a["label"], a["score"]) for a in reference(TEXTS)]

    def test_refuses_what_the_graph_has_not(self, optimized: Any, encoded: Any) -> None:
        for flag in ("output_attentions", "output_hidden_states"):
            with pytest.raises(InputError, match=f"{flag}=True"):
                optimized(**encoded, **{flag: True})
        with pytest.raises(InputError, match="does not take labels"):
            optimized(**encoded, labels=torch.tensor([0, 1, 2]))
        with pytest.raises(InputError, match="no input 'inputs_embeds'"):
            optimized(encoded["input_ids"], inputs_embeds=torch.zeros(3, 4, 32))
        with pytest.raises(InputError, match=r"cannot be called with these arguments: multiple values"):
            optimized(encoded["input_ids"], input_ids=encoded["input_ids"])
        with pytest.raises(InputError, match="cannot be trained"):
            optimized.train()
        for move in (optimized.half, optimized.double, optimized.bfloat16):
            with pytest.raises(LoadError, match="cannot be converted"):
                move()
        for move in (optimized.cuda, lambda: optimized.to("cuda"), lambda: optimized.to(device="cuda")):
            with pytest.raises(LoadError, match="cannot be moved"):
                move()

    def test_saves_and_loads_the_artifact(self, optimized: Any, encoded: Any, tmp_path: Path) -> None:
        optimized.save_pretrained(tmp_path / "saved")
        reloaded = type(optimized).from_pretrained(tmp_path / "saved")

        assert isinstance(reloaded, transformers.BertForSequenceClassification)
        assert torch.equal(reloaded(**encoded).logits, optimized(**encoded).logits)

    def test_task_decides_the_class_of_a_model_with_another_head(
        self, pipeline: Pipeline, tiny_model: ModelFactory
    ) -> None:
        folder = tiny_model(HfTask.FILL_MASK, "roberta")
        optimized = compileflow.optimize("feature-extraction", folder, **SMALL)
        source = load_source(folder, HfTask.FEATURE_EXTRACTION)
        ids = torch.tensor([[5, 6, 7]])

        assert type(source).__name__ == "RobertaModel"
        assert isinstance(optimized, transformers.RobertaModel)
        with torch.no_grad():
            expected = source(ids).last_hidden_state
        torch.testing.assert_close(optimized(ids).last_hidden_state, expected, atol=1e-5, rtol=0)
