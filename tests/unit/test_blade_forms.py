"""The forms of BladeDISC's adapter: its arguments by position and by name, `.info` and `.opt_model`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import compileflow
from compileflow import CompiledModel, HfTask
from compileflow.errors import LoadError, SpecError, VerdictError
from compileflow.local import api
from compileflow.local.blade_forms import autocast_precision
from compileflow.local.source import default_model
from compileflow.settings import get_settings
from compileflow.testing.pipelines import assert_same_result
from tests.conftest import ModelFactory
from tests.hub_server import Hub
from tests.models import sentences
from tests.steps import Pipeline

TASK = HfTask.FILL_MASK
SMALL: dict[str, Any] = {
    "target": "torchscript",
    "shape_buckets": ({"batch_size": 2, "sequence_length": 32},),
    "validate": False,
}
TEXTS = [text[:40] for text in sentences()[:3]]


@pytest.fixture
def folder(pipeline: Pipeline, tiny_model: ModelFactory) -> Path:
    """A model's folder; compiles run in this process, into a store of the test."""
    return tiny_model(TASK)


@pytest.fixture
def source(folder: Path) -> Any:
    return transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()


@pytest.fixture
def nameless(source: Any) -> Any:
    """The model without a place that it was loaded from."""
    source.name_or_path = source.config.name_or_path = ""
    return source


def test_arguments_have_the_names_and_the_order_of_the_adapter() -> None:
    names = [
        name
        for name, parameter in inspect.signature(compileflow.optimize).parameters.items()
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    assert names == [
        "task", "id_or_path", "model", "preprocessor", "skip_compile", "amp", "device", "model_kwargs",
        "example_inputs", "output_names", "forward_default_kwargs",
    ]  # fmt: skip


@pytest.mark.parametrize("form", ["id_or_path", "position", "model", "object"])
def test_optimized_model_answers_its_example_inputs_like_the_source_model(
    folder: Path, source: Any, form: str
) -> None:
    calls: dict[str, Callable[[], Any]] = {
        "id_or_path": lambda: compileflow.optimize(id_or_path=str(folder), **SMALL),
        "position": lambda: compileflow.optimize("fill-mask", folder, **SMALL),
        "model": lambda: compileflow.optimize(
            task="fill-mask", model=folder, model_kwargs={"torchscript": True}, device=torch.device("cpu"), **SMALL
        ),
        "object": lambda: compileflow.optimize(task="fill-mask", model=source, **SMALL),
    }
    optimized = calls[form]()
    info = optimized.info

    outputs = optimized(**info.example_inputs)
    with torch.no_grad():
        expected = source(**info.example_inputs)
    assert list(outputs) == info.output_names == ["logits"]
    torch.testing.assert_close(outputs["logits"], expected["logits"], atol=1e-4, rtol=0)
    assert (info.task, info.id_or_path) == ("fill-mask", str(folder))
    assert info.model_class is transformers.BertForMaskedLM
    assert info.input_order == ["input_ids", "attention_mask", "token_type_ids"]
    assert info.config is optimized.config
    assert isinstance(optimized.opt_model, CompiledModel)
    by_position = optimized.opt_model(*(info.example_inputs[name] for name in info.input_order))
    assert torch.equal(by_position.logits, outputs.logits)


def test_given_examples_outputs_and_default_arguments_are_used(folder: Path, source: Any) -> None:
    ids = torch.tensor([[5, 6, 7]])
    optimized = compileflow.optimize(
        "fill-mask",
        folder,
        example_inputs={"input_ids": ids},
        output_names=["logits"],
        forward_default_kwargs={"output_attentions": False, "attention_mask": lambda: torch.tensor([[1, 1, 0]])},
        **SMALL,
    )
    with torch.no_grad():
        expected = source(ids, torch.tensor([[1, 1, 0]])).logits

    assert optimized.info.example_inputs == {"input_ids": ids}
    assert optimized.info.input_order == ["input_ids"]
    torch.testing.assert_close(optimized(ids).logits, expected, atol=1e-4, rtol=0)
    assert type(optimized(ids, return_dict=False)) is tuple


@pytest.mark.parametrize(
    ("forms", "says"),
    [
        (
            {"example_inputs": {"wrong": 1}},
            "example_inputs has 'wrong', which BertForMaskedLM does not have.*input_ids",
        ),
        ({"output_names": ["hidden"]}, "output_names has 'hidden'.*logits"),
        ({"forward_default_kwargs": {"use_cash": True}}, "forward_default_kwargs has 'use_cash'"),
        ({"model_kwargs": {"num_labels": 7}}, "model_kwargs has 'num_labels'.*torchscript"),
        ({"id_or_path": "a", "model": "b"}, "Both id_or_path and model"),
    ],
)
def test_form_that_the_model_does_not_have_is_refused(folder: Path, forms: dict[str, Any], says: str) -> None:
    location = {} if "model" in forms else {"id_or_path": folder}
    with pytest.raises(SpecError, match=says):
        compileflow.optimize(**location, **forms, **SMALL)


def test_amp_and_skip_compile_choose_precision_and_target(folder: Path) -> None:
    assert autocast_precision("fp32", "openvino", amp=True) == "bf16"
    assert autocast_precision("fp32", "blade", amp=True) == "fp16"
    assert autocast_precision("fp16", "openvino", amp=True) == "fp16"
    optimized = compileflow.optimize(id_or_path=folder, skip_compile=True, **SMALL | {"target": "auto-local"})

    assert optimized.compiled.manifest.target.name == "torchscript"
    with pytest.raises(LoadError, match="from the CPU, got device='cuda'"):
        compileflow.optimize(id_or_path=folder, device="cuda", **SMALL)


class TestModelWithoutTokenizer:
    def test_is_proven_on_token_ids(
        self, nameless: Any, monkeypatch: pytest.MonkeyPatch, pipeline: Pipeline
    ) -> None:
        compared: list[Any] = []
        compare = api.compare_with_source
        monkeypatch.setattr(api, "compare_with_source", lambda *args: (compared.append(args), compare(*args)))

        optimized = compileflow.optimize("fill-mask", model=nameless, **SMALL | {"validate": True})

        assert [model for model, _, _ in compared] == [nameless]
        assert pipeline.counts["validate"] == 0
        ids = torch.tensor([[5, 6, 7]])
        with torch.no_grad():
            torch.testing.assert_close(optimized(ids).logits, nameless(ids).logits, atol=1e-4, rtol=0)
        assert optimized.info.id_or_path == ""

    def test_that_answers_otherwise_is_refused(self, nameless: Any) -> None:
        forward = nameless.forward

        def shifted(*args: Any, **kwargs: Any) -> Any:
            answer = forward(*args, **kwargs)
            answer.logits = answer.logits + 0.5
            return answer

        nameless.forward = shifted
        with pytest.raises(VerdictError, match="does not answer like its source model"):
            compileflow.optimize("fill-mask", model=nameless, **SMALL | {"validate": True})

    def test_tokenizer_is_found_at_the_place_of_the_model(self, source: Any) -> None:
        fill = compileflow.pipeline(model=source, **SMALL)

        assert len(fill("the [MASK] is here")) == 5


def test_id_without_an_owner_is_one_on_the_hub(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.add("bert-base-uncased", {path.name: path.read_bytes() for path in folder.iterdir()})
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.chdir(tmp_path)
    get_settings.cache_clear()

    fill = compileflow.pipeline(model="bert-base-uncased", **SMALL)
    optimized = compileflow.optimize(id_or_path="bert-base-uncased", **SMALL)

    assert len(fill("the [MASK] is here")) == 5
    assert optimized.info.id_or_path == "bert-base-uncased"


def test_compiled_model_is_put_into_a_pipeline_as_it_is(folder: Path, source: Any, pipeline: Pipeline) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    reference = transformers.pipeline("fill-mask", model=source, tokenizer=tokenizer)
    optimized = compileflow.optimize(id_or_path=folder, **SMALL)

    for model in (optimized, optimized.opt_model):
        for parts in ({}, {"tokenizer": tokenizer}, {"tokenizer": str(folder)}):
            fill = compileflow.pipeline("fill-mask", model=model, top_k=2, **parts)
            assert_same_result(fill("the [MASK] is here"), reference("the [MASK] is here", top_k=2))
    assert compileflow.optimize(model=optimized).opt_model is optimized.opt_model
    assert pipeline.counts["compile"] == 1


def test_pipeline_takes_the_same_settings(folder: Path) -> None:
    fill = compileflow.pipeline(
        task="fill-mask",
        model=folder,
        use_fast=True,
        device=torch.device("cpu"),
        model_kwargs={"torchscript": True},
        output_names=["logits"],
        forward_default_kwargs={"output_attentions": False},
        skip_compile=True,
        **SMALL | {"target": "auto-local"},
    )

    assert fill.model.manifest.target.name == "torchscript"
    assert len(fill("the [MASK] is here")) == 5
    with pytest.raises(SpecError, match="output_names has 'hidden'"):
        compileflow.pipeline(model=folder, output_names=["hidden"], **SMALL)


def test_every_task_of_the_adapter_has_a_default_model() -> None:
    tasks = (
        "feature-extraction",
        "text-classification",
        "token-classification",
        "question-answering",
        "fill-mask",
    )
    names = [default_model(HfTask(task))[0] for task in tasks]

    assert names[3] == "distilbert/distilbert-base-cased-distilled-squad"
    assert all("/" in name for name in names)
