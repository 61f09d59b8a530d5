"""The calls that services make to an older library work as they are written, and its faults are not kept.

Over 300 lines, because all of it shares one set of compiled models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from compileflow import CompiledModel, CompiledPipeline, CompiledTokenizer, HfTask
from compileflow._process.run_in_child import run_in_child
from compileflow.contracts import TensorRecord
from compileflow.errors import (
    InputError,
    IntegrityError,
    LoadError,
    SpecError,
    StoreError,
    TargetUnavailableError,
    VerdictError,
)
from compileflow.local import in_memory as local_compile
from compileflow.local.comparison import Tolerance, check_output
from compileflow.source_model.tasks import AUTO_CLASSES
from compileflow.testing.pipelines import assert_same_result
from compileflow.testing.targets import hide_distributions
from tests.conftest import ModelFactory
from tests.doubles.fixtures import vendor_doubles as vendor_doubles
from tests.models import MAX_TOKENS, sentences

pytestmark = pytest.mark.usefixtures("file_home")
ROOT = Path(__file__).parents[2]
TASK = HfTask.TEXT_CLASSIFICATION
LENGTH = 16
TEXTS = sentences()
ATOL = 1e-5
CELLS = [
    ("bert", 1),
    ("bert", 4),
    ("distilbert", 2),
    ("roberta", 4),
    ("xlm-roberta", 2),
    *(
        pytest.param(architecture, rows, marks=pytest.mark.slow)
        for architecture, rows in (
            ("bert", 2),
            ("distilbert", 1),
            ("distilbert", 4),
            ("roberta", 1),
            ("roberta", 2),
            ("xlm-roberta", 1),
            ("xlm-roberta", 4),
        )
    ),
]

Sources = Callable[..., Any]


@pytest.fixture(scope="module")
def source(tiny_model: ModelFactory) -> Sources:
    """Load models with transformers: `source("bert")` gives a pipeline of its own, to keep and to change."""

    def load(architecture: str, hf_task: HfTask = TASK) -> Any:
        base = "roberta" if architecture == "xlm-roberta" else architecture
        folder = tiny_model(hf_task, base)
        model = getattr(transformers, AUTO_CLASSES[hf_task]).from_pretrained(folder)
        if architecture == "xlm-roberta":
            fields = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "architectures")}
            twin = transformers.XLMRobertaForSequenceClassification(transformers.XLMRobertaConfig(**fields))
            twin.load_state_dict(model.state_dict())
            model = twin.eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        return transformers.pipeline(hf_task.value, model=model, tokenizer=tokenizer)

    return load


@pytest.fixture(scope="module")
def compiled_pipeline(source: Sources) -> Callable[..., CompiledPipeline]:
    """Compile a pipeline once a cell, by the signature that services write."""

    @cache
    def compile_it(architecture: str, batch_size: int, hf_task: HfTask = TASK) -> CompiledPipeline:
        return CompiledPipeline.from_pipeline(source(architecture, hf_task), LENGTH, batch_size, neuron=False)

    return compile_it


@pytest.fixture(scope="module")
def compiled_model(source: Sources) -> CompiledModel:
    """A model alone, batch size 2."""
    model: CompiledModel = CompiledModel.from_model(
        source("bert").model, batch_size=2, max_length=LENGTH, neuron=False
    )
    return model


def tokens_of(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


def specs(batch_size: int, max_length: int, target: str, **options: Any) -> dict[str, Any]:
    """Return the compilation_specs of this shape: the names of compileflow and those of the older library."""
    return {
        "batch_size": batch_size,
        "max_length": max_length,
        "target": target,
        **options,
        "tracing_kwargs": options,
        "tracing__batch_size": batch_size,
        "tracing__max_length": max_length,
        "tracing__neuron": target == "neuron",
    }


def everything_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


class TestTokenizer:
    @pytest.fixture
    def plain(self, tiny_model: ModelFactory) -> Any:
        return tokens_of(tiny_model(TASK))

    def test_pads_and_truncates_to_the_tokenizers_maximum_by_default(self, plain: Any) -> None:
        tokenizer = CompiledTokenizer.from_tokenizer(plain)

        assert tokenizer.tokenization_settings == {
            "padding": "max_length",
            "truncation": True,
            "add_special_tokens": True,
            "max_length": MAX_TOKENS,
        }
        assert len(tokenizer(TEXTS[0])["input_ids"]) == MAX_TOKENS
        assert len(tokenizer(" ".join(TEXTS))["input_ids"]) == MAX_TOKENS

    def test_settings_and_defaults_win_over_the_call(self, plain: Any, tmp_path: Path) -> None:
        tokenizer = CompiledTokenizer.from_tokenizer(plain, max_length=8, add_special_tokens=False)
        tokenizer.save_pretrained(tmp_path)

        assert tokenizer.tokenization_settings["max_length"] == 8
        for item in (tokenizer, CompiledTokenizer.from_pretrained(tmp_path)):
            fixed = item("the", max_length=12, add_special_tokens=True)
            assert len(fixed["input_ids"]) == 8
            assert plain.cls_token_id not in fixed["input_ids"]
            assert len(item("the", padding=False)["input_ids"]) == 8
            encoded = item(["the"], truncation=True, padding=True, return_tensors="np")
            assert encoded["attention_mask"].shape == (1, 8)

    def test_has_the_attributes_and_methods_of_the_older_library(self, plain: Any) -> None:
        tokenizer = CompiledTokenizer.from_tokenizer(plain, max_length=8)

        assert tokenizer.compiled is True
        assert tokenizer.is_fast is plain.is_fast is True
        assert tokenizer.model_max_length == 8
        assert tokenizer.unk_token_id == plain.unk_token_id
        assert tokenizer.clean_up_tokenization("some ,example text .") == "some,example text."
        # These are the wrapped tokenizer's, without the settings.
        assert tokenizer.encode(TEXTS[0]) == plain.encode(TEXTS[0])
        assert tokenizer.encode_plus(TEXTS[0], TEXTS[1]).data == plain(TEXTS[0], TEXTS[1]).data
        assert tokenizer.decode(plain.encode("the")) == plain.decode(plain.encode("the"))
        assert tokenizer.convert_ids_to_tokens([5, 6]) == plain.convert_ids_to_tokens([5, 6])

    @pytest.mark.parametrize("architecture", ["bert", "roberta"])
    def test_token_types_of_sequences_are_those_of_tokenized_texts(
        self, tiny_model: ModelFactory, architecture: str
    ) -> None:
        plain = tokens_of(tiny_model(TASK, architecture))
        tokenizer = CompiledTokenizer.from_tokenizer(plain)
        first, second = plain.tokenize("the order is here"), plain.tokenize("where")

        types = tokenizer.create_token_type_ids_from_sequences
        single = plain("the order is here", return_token_type_ids=True)["token_type_ids"]
        pair = plain("the order is here", "where", return_token_type_ids=True)["token_type_ids"]
        assert types(first) == single
        assert types(first, second) == pair

    @pytest.mark.parametrize(("wrong", "right"), [("paddding", "padding"), ("max_len", "max_length")])
    def test_misspelled_setting_is_refused_with_the_near_name(self, plain: Any, wrong: str, right: str) -> None:
        with pytest.raises(SpecError, match=rf"has no setting '{wrong}'\. Did you mean .*\b{right}\b"):
            CompiledTokenizer.from_tokenizer(plain, **{wrong: True})

    @pytest.mark.parametrize("length", ["16", -3, 0, 8.0, True])
    def test_length_that_is_not_a_positive_number_is_refused(
        self, plain: Any, tmp_path: Path, length: Any
    ) -> None:
        with pytest.raises(SpecError, match=f"whole number of at least 1, got {length!r}"):
            CompiledTokenizer.from_tokenizer(plain, max_length=length)
        CompiledTokenizer.from_tokenizer(plain).save_pretrained(tmp_path)
        (tmp_path / "tokenization_settings.json").write_text(json.dumps({"max_length": length}))
        with pytest.raises(LoadError, match="whole number of at least 1"):
            CompiledTokenizer.from_pretrained(tmp_path)

    def test_tokenizer_without_a_maximum_needs_a_length(self, plain: Any) -> None:
        plain.model_max_length = int(1e30)

        with pytest.raises(SpecError, match="has no maximum length"):
            CompiledTokenizer.from_tokenizer(plain)
        assert len(CompiledTokenizer.from_tokenizer(plain, max_length=9)("the")["input_ids"]) == 9

    def test_settings_survive_saving_and_loading(self, plain: Any, tmp_path: Path) -> None:
        tokenizer = CompiledTokenizer.from_tokenizer(plain, max_length=8)
        tokenizer.save_pretrained(tmp_path / "saved")

        reloaded = CompiledTokenizer.from_pretrained(tmp_path / "saved")

        assert reloaded.tokenization_settings == tokenizer.tokenization_settings
        assert reloaded(TEXTS[:3], max_length=5).data == tokenizer(TEXTS[:3]).data

    def test_saved_files_do_not_depend_on_earlier_calls(self, plain: Any, tmp_path: Path) -> None:
        CompiledTokenizer.from_tokenizer(plain).save_pretrained(tmp_path / "before")
        plain(TEXTS[:2], padding=True, truncation=True, max_length=5)
        CompiledTokenizer.from_tokenizer(plain).save_pretrained(tmp_path / "after")

        for name in everything_below(tmp_path / "before"):
            assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()

    def test_side_that_is_padded_survives_saving(self, plain: Any, tmp_path: Path) -> None:
        tokenizer = CompiledTokenizer.from_tokenizer(plain, max_length=5)
        tokenizer.padding_side = "left"
        tokenizer.save_pretrained(tmp_path)

        assert CompiledTokenizer.from_pretrained(tmp_path)("the")["attention_mask"] == [0, 0, 1, 1, 1]

    def test_folder_that_transformers_saved_loads_with_the_defaults(self, plain: Any, tmp_path: Path) -> None:
        plain.save_pretrained(tmp_path)

        assert CompiledTokenizer.from_pretrained(tmp_path).tokenization_settings["padding"] == "max_length"

    def test_spoilt_settings_file_is_refused(self, plain: Any, tmp_path: Path) -> None:
        CompiledTokenizer.from_tokenizer(plain).save_pretrained(tmp_path)
        (tmp_path / "tokenization_settings.json").write_text("[]")

        with pytest.raises(LoadError, match=r"tokenization_settings\.json was not written by"):
            CompiledTokenizer.from_pretrained(tmp_path)

    def test_tokenizer_does_not_spoil_an_artifact(
        self, plain: Any, compiled_model: CompiledModel, tmp_path: Path
    ) -> None:
        folder = compiled_model.save_pretrained(tmp_path / "model")
        before = everything_below(folder)

        with pytest.raises(StoreError, match="contains a compiled artifact"):
            CompiledTokenizer.from_tokenizer(plain).save_pretrained(folder)
        assert everything_below(folder) == before


@pytest.mark.parametrize(("architecture", "batch_size"), CELLS)
def test_pipeline_answers_like_the_original_before_and_after_saving(
    compiled_pipeline: Callable[..., CompiledPipeline], tmp_path: Path, architecture: str, batch_size: int
) -> None:
    pipeline = compiled_pipeline(architecture, batch_size)
    loaded = CompiledPipeline.from_pretrained(pipeline.save_pretrained(tmp_path / "saved"))
    original = pipeline.original_pipeline
    long = " ".join(TEXTS[:20])

    for item in (pipeline, loaded):
        assert item.model.compilation_specs == specs(batch_size, LENGTH, "torchscript")
        assert item.tokenizer.tokenization_settings["max_length"] == LENGTH
        for texts in (TEXTS[0], TEXTS[:3], TEXTS[:5], [TEXTS[0], long]):
            expected = original(texts, truncation=True, max_length=LENGTH)
            assert_same_result(item(texts), expected)
            assert_same_result(item(texts, batch_size=3), expected)
        assert isinstance(item.model, CompiledModel)
        assert isinstance(item.model, transformers.PreTrainedModel)
        assert isinstance(item.tokenizer, CompiledTokenizer)
        assert item.model is item.compiled_pipeline.model
        assert item.tokenizer is item.compiled_pipeline.tokenizer
        assert item.original_pipeline_task == TASK.value
        assert not isinstance(item.original_pipeline.model, CompiledModel)
        assert_same_result(item.original_pipeline(TEXTS[:2]), original(TEXTS[:2]))
    assert type(pipeline.compiled_pipeline) is type(original)


@pytest.mark.parametrize("hf_task", [HfTask.TOKEN_CLASSIFICATION, HfTask.FILL_MASK])
def test_other_pipelines_answer_like_the_original(
    compiled_pipeline: Callable[..., CompiledPipeline], hf_task: HfTask
) -> None:
    pipeline = compiled_pipeline("bert", 2, hf_task)
    texts = ["the [MASK] is here", "a [MASK]."] if hf_task is HfTask.FILL_MASK else ["the order", "where is my"]

    assert_same_result(pipeline(texts), pipeline.original_pipeline(texts))


def test_features_come_for_each_of_max_length_tokens_unless_padding_is_off(source: Sources) -> None:
    original = source("bert", HfTask.FEATURE_EXTRACTION)
    padded = CompiledPipeline.from_pipeline(original, LENGTH, neuron=False)
    unpadded = CompiledPipeline.from_pipeline(
        original, LENGTH, neuron=False, tokenizer_settings={"padding": False}
    )
    expected = original("the")

    assert len(padded("the")[0]) == LENGTH
    assert_same_result(padded("the")[0][: len(expected[0])], expected[0])
    assert_same_result(unpadded("the"), expected)


def test_pipeline_keeps_its_own_settings(source: Sources) -> None:
    plain = source("bert")
    original = transformers.pipeline(TASK.value, model=plain.model, tokenizer=plain.tokenizer, top_k=None)
    pipeline = CompiledPipeline.from_pipeline(original, max_length=LENGTH, neuron=False)

    assert len(pipeline(TEXTS[0])[0]) == 3
    assert_same_result(pipeline(TEXTS[0]), original(TEXTS[0], truncation=True, max_length=LENGTH))


def test_tokenizer_settings_of_a_pipeline_survive_and_win(source: Sources, tmp_path: Path) -> None:
    pipeline = CompiledPipeline.from_pipeline(
        source("bert"), max_length=LENGTH, neuron=False, tokenizer_settings={"max_length": 8}
    )
    loaded = CompiledPipeline.from_pretrained(pipeline.save_pretrained(tmp_path / "saved"))

    for tokenizer in (pipeline.tokenizer, loaded.tokenizer, CompiledTokenizer.from_pretrained(tmp_path / "saved")):
        assert len(tokenizer(TEXTS[0], max_length=12)["input_ids"]) == 8
    assert_same_result(loaded(TEXTS[:3]), pipeline(TEXTS[:3]))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tokenizer_settings": {"paddding": True}}, "Did you mean padding"),
        ({"tokenizer_settings": {"max_length": LENGTH + 1}}, "is compiled for 16 tokens"),
        ({"model_tracing_settings": {"batchsize": 2}}, "Did you mean batch_size"),
        (
            {"model_tracing_settings": {"frozen": True}},
            "torchscript option frozen: .*The options of torchscript are: none",
        ),
        ({"max_length": MAX_TOKENS + 1}, f"positions for {MAX_TOKENS} tokens"),
        ({"max_length": 0}, "Expected max_length as a whole number of at least 1, got 0"),
        ({"max_length": None}, "Expected max_length as a whole number of tokens, got None"),
        ({"max_length": "8"}, "Expected max_length as a whole number of tokens, got '8'"),
        ({"max_length": 8.5}, r"Expected max_length as a whole number of tokens, got 8\.5"),
        ({"pipeline": "sentiment-analysis"}, r"Expected a transformers pipeline, got str\."),
        ({"pipeline": None}, r"Expected a transformers pipeline, got NoneType\."),
        ({"tokenizer_settings": ["a"]}, r"Expected tokenizer_settings as a dict .*, got \['a'\]"),
        ({"tokenizer_settings": {1: 2}}, r"Expected tokenizer_settings as a dict .*, got \{1: 2\}"),
        ({"model_tracing_settings": ["a"]}, r"Expected model_tracing_settings as a dict .*, got \['a'\]"),
        ({"validation_rtol": "small"}, "Expected validation_rtol as a number of at least 0, got 'small'"),
        ({"validation_atol": -1}, "Expected validation_atol as a number of at least 0, got -1"),
        ({"batch_size": 0}, "batch_size: .*got 0"),
        ({"target": "torchscrip"}, "Unknown target 'torchscrip'.*torchscript"),
    ],
)
def test_what_cannot_be_meant_is_refused(source: Sources, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        CompiledPipeline.from_pipeline(
            **({"pipeline": source("bert"), "max_length": LENGTH, "neuron": False} | settings)
        )


def test_objects_of_another_kind_are_refused(source: Sources) -> None:
    model = source("bert").model

    with pytest.raises(SpecError, match=r"Expected a transformers pipeline, got BertForSequenceClassification\."):
        CompiledPipeline.from_pipeline(model, LENGTH, neuron=False)
    with pytest.raises(SpecError, match=r"Expected a CompiledModel, got BertForSequenceClassification\."):
        CompiledPipeline.from_model(model)
    for wrong in (model, None, "bert"):
        with pytest.raises(SpecError, match=f"Expected a transformers tokenizer, got {type(wrong).__name__}"):
            CompiledTokenizer.from_tokenizer(wrong)
    with pytest.raises(SpecError, match="Expected a pipeline as original_pipeline, got BertForSequence"):
        CompiledPipeline(original_pipeline=model, compiled_pipeline=source("bert"))
    with pytest.raises(SpecError, match="Expected a pipeline as compiled_pipeline, got NoneType"):
        CompiledPipeline(original_pipeline=None, compiled_pipeline=None)
    with pytest.raises(SpecError, match="Expected max_length as a whole number of tokens, got '8'"):
        CompiledModel.from_model(model, max_length="8", neuron=False)


class TestModel:
    @pytest.mark.parametrize("rows", [1, 2, 5])
    @pytest.mark.parametrize("length", [1, 9, LENGTH])
    def test_answers_like_its_source_before_and_after_saving(
        self, compiled_model: CompiledModel, source: Sources, tmp_path: Path, rows: int, length: int
    ) -> None:
        original = source("bert").model
        loaded = CompiledModel.from_pretrained(compiled_model.save_pretrained(tmp_path / "saved"))
        random = torch.Generator().manual_seed(rows)
        ids = torch.randint(5, original.config.vocab_size, (rows, length), generator=random)
        mask = (torch.arange(length) < torch.arange(1, rows + 1)[:, None] * 4).long()
        types = (torch.arange(length) % 2).expand(rows, length)
        with torch.no_grad():
            expected = original(input_ids=ids, attention_mask=mask, token_type_ids=types)
            plain = original(input_ids=ids, attention_mask=mask)

        for model in (compiled_model, loaded):
            answer = model(input_ids=ids, attention_mask=mask, token_type_ids=types)
            assert type(answer) is type(expected)
            torch.testing.assert_close(answer.logits, expected.logits, atol=ATOL, rtol=0)
            assert model.compilation_specs == specs(2, LENGTH, "torchscript")
        # The token types are not dropped: without them the answer is another.
        assert length == 1 or not torch.allclose(plain.logits, expected.logits, atol=1e-3)

    def test_takes_tensors_by_position_and_answers_by_index_and_by_name(
        self, compiled_model: CompiledModel, source: Sources
    ) -> None:
        ids, mask = torch.tensor([[5, 6, 7]]), torch.tensor([[1, 1, 0]], dtype=torch.int32)
        with torch.no_grad():
            expected = source("bert").model(ids, mask).logits

        answer = compiled_model(ids, mask)
        assert answer[0] is answer["logits"] is answer.logits
        for logits in (answer[0], compiled_model.forward(ids, mask)[0], compiled_model.model(ids, mask)["logits"]):
            torch.testing.assert_close(logits, expected, atol=ATOL, rtol=0)
        with pytest.raises(InputError, match="at most 3 inputs, got 4"):
            compiled_model(ids, mask, None, mask)
        with pytest.raises(InputError, match="attention_mask was passed twice"):
            compiled_model(ids, mask, attention_mask=mask)

    def test_is_a_model_of_transformers_that_cannot_be_changed(self, compiled_model: CompiledModel) -> None:
        assert isinstance(compiled_model, transformers.PreTrainedModel)
        assert not compiled_model.training
        assert list(compiled_model.parameters()) == []
        assert compiled_model.eval() is compiled_model.to("cpu") is compiled_model.train(False) is compiled_model
        with pytest.raises(InputError, match="cannot be trained"):
            compiled_model.train()
        with pytest.raises(LoadError, match="cannot be converted"):
            compiled_model.half()

    @pytest.mark.parametrize("architecture", ["distilbert", "roberta"])
    def test_default_length_is_the_models_own_maximum(self, source: Sources, architecture: str) -> None:
        original = source(architecture).model
        model = CompiledModel.from_model(original, neuron=False)
        ids = torch.full((1, MAX_TOKENS), 7)

        assert model.compilation_specs == specs(1, MAX_TOKENS, "torchscript")
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, original(ids).logits, atol=ATOL, rtol=0)
        with pytest.raises(InputError, match=f"at most {MAX_TOKENS}"):
            model(torch.full((1, MAX_TOKENS + 1), 7))

    def test_artifact_of_a_model_alone_has_no_tokenizer(self, compiled_model: CompiledModel) -> None:
        for kind in (CompiledTokenizer, CompiledPipeline):
            with pytest.raises(LoadError, match=r"no tokenizer.*from_pipeline"):
                kind.from_pretrained(compiled_model.artifact.folder)

    def test_source_model_stays_as_it_is(self, source: Sources) -> None:
        model = source("bert").model.to(torch.float64)
        model.train()
        model.bert.encoder.layer[0].eval()
        model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
        model.set_attn_implementation("eager")

        def state() -> dict[str, Any]:
            return {
                "modes": [module.training for module in model.modules()],
                "config": dict(deepcopy(vars(model.config))),
                "generation": deepcopy(getattr(model, "generation_config", None)),
                "attention": model.config._attn_implementation,
                "attributes": sorted(vars(model)),
                "parameters": [
                    (name, p.dtype, p.device, p.requires_grad, p.grad is None, p.detach().sum().item())
                    for name, p in model.named_parameters()
                ],
                "random": torch.random.get_rng_state().tolist(),
            }

        before = state()
        compiled = CompiledModel.from_model(model, max_length=LENGTH, neuron=False)

        assert state() == before
        assert compiled(torch.tensor([[5, 6]])).logits.dtype == torch.float32

    def test_saved_folder_holds_the_weights_once(self, compiled_model: CompiledModel, tmp_path: Path) -> None:
        folder = compiled_model.save_pretrained(tmp_path / "saved")
        weights = compiled_model.manifest.components["default"].folder

        assert everything_below(folder) == {"manifest.json", "config.json", f"{weights}/model.pt"}

    def test_is_compiled_in_a_process_of_its_own(
        self, source: Sources, compiled_model: CompiledModel, monkeypatch: pytest.MonkeyPatch, file_home: Path
    ) -> None:
        monkeypatch.setattr(local_compile, "run_in_child", run_in_child)
        ids = torch.tensor([[5, 6, 7]])

        model = CompiledModel.from_model(source("bert").model, 2, LENGTH, neuron=False)

        assert torch.equal(model(ids).logits, compiled_model(ids).logits)
        assert list((file_home / "work").iterdir()) == []
        assert list((file_home / "logs").iterdir()) == []

    @pytest.mark.parametrize("wrong", ["bert-base-cased", torch.nn.Linear(2, 2)])
    def test_what_is_no_transformers_model_is_refused(self, wrong: Any) -> None:
        with pytest.raises(SpecError, match=f"transformers model with its weights, got {type(wrong).__name__}"):
            CompiledModel.from_model(wrong, neuron=False)


@pytest.mark.parametrize("alias", ["sentiment-analysis", "ner"])
def test_aliases_of_tasks_are_compiled(source: Sources, tmp_path: Path, alias: str) -> None:
    hf_task = HfTask(alias)
    plain = source("bert", hf_task)
    original = transformers.pipeline(alias, model=plain.model, tokenizer=plain.tokenizer)
    pipeline = CompiledPipeline.from_pipeline(original, LENGTH, neuron=False)
    folder = pipeline.save_pretrained(tmp_path / "saved")

    loaded = [CompiledPipeline.from_pretrained(folder, task=task) for task in (None, alias)]
    for item in (pipeline, *loaded):
        assert item.original_pipeline_task == alias
        assert item.model.manifest.hf_task is hf_task
        assert_same_result(item(TEXTS[0][:20]), original(TEXTS[0][:20]))


Parts = tuple[Any, CompiledModel, CompiledTokenizer]


class TestPipelineOfParts:
    @pytest.fixture
    def parts(self, source: Sources, compiled_model: CompiledModel) -> Parts:
        original = source("bert")
        return original, compiled_model, CompiledTokenizer.from_tokenizer(original.tokenizer, max_length=LENGTH)

    def test_is_saved_and_loaded_whole(self, parts: Parts, tmp_path: Path) -> None:
        original, model, tokenizer = parts
        inner = transformers.pipeline(TASK.value, model=model, tokenizer=tokenizer)
        pipeline = CompiledPipeline(original_pipeline=original, compiled_pipeline=inner)
        assert pipeline.compiled_pipeline is inner
        assert pipeline.model is model
        assert pipeline.tokenizer is tokenizer
        assert pipeline.original_pipeline is original
        loaded = CompiledPipeline.from_pretrained(pipeline.save_pretrained(tmp_path / "saved"))

        expected = original(TEXTS[:3], truncation=True, max_length=LENGTH)
        for item in (pipeline, loaded):
            assert item.original_pipeline_task == TASK.value
            assert_same_result(item(TEXTS[:3]), expected)
        assert loaded.tokenizer.tokenization_settings == tokenizer.tokenization_settings
        assert_same_result(loaded.original_pipeline(TEXTS[:3], truncation=True, max_length=LENGTH), expected)

    def test_uncompiled_pipeline_answers_but_cannot_be_saved(self, source: Sources, tmp_path: Path) -> None:
        original = source("bert")
        pipeline = CompiledPipeline(original_pipeline=original, compiled_pipeline=original)

        assert pipeline.tokenizer is original.tokenizer
        assert_same_result(pipeline(TEXTS[0]), original(TEXTS[0]))
        with pytest.raises(SpecError, match="no compiled model to save"):
            pipeline.save_pretrained(tmp_path)


class TestSavedFolder:
    def test_saving_again_replaces_the_artifact(
        self, compiled_pipeline: Callable[..., CompiledPipeline], compiled_model: CompiledModel, tmp_path: Path
    ) -> None:
        pipeline = compiled_pipeline("bert", 4)
        folder = compiled_model.save_pretrained(tmp_path / "saved")
        pipeline.save_pretrained(folder)
        once = everything_below(folder)
        loaded = CompiledPipeline.from_pretrained(pipeline.save_pretrained(folder))
        assert loaded.save_pretrained(folder) == folder

        assert everything_below(folder) == once
        assert_same_result(loaded(TEXTS[:3]), pipeline(TEXTS[:3]))

    @pytest.mark.parametrize("place", ["components", "pipeline"])
    def test_other_files_are_never_deleted(
        self, compiled_pipeline: Callable[..., CompiledPipeline], tmp_path: Path, place: str
    ) -> None:
        folder = compiled_pipeline("bert", 4).save_pretrained(tmp_path / "saved")
        (folder / place / "notes.txt").write_text("x")
        before = everything_below(folder)

        with pytest.raises(StoreError, match="is not empty"):
            compiled_pipeline("bert", 1).save_pretrained(folder)
        assert everything_below(folder) == before

    def test_altered_original_is_refused_when_it_is_used(
        self, compiled_pipeline: Callable[..., CompiledPipeline], tmp_path: Path
    ) -> None:
        folder = compiled_pipeline("bert", 4).save_pretrained(tmp_path / "saved")
        (folder / "pipeline" / "config.json").write_text("{}")
        loaded = CompiledPipeline.from_pretrained(folder)

        assert loaded(TEXTS[0])
        with pytest.raises(IntegrityError, match="pipeline was altered"):
            loaded.original_pipeline  # noqa: B018 - reading it loads it


def test_settings_that_only_the_older_tracers_have_are_ignored_with_one_line(
    source: Sources, caplog: pytest.LogCaptureFixture
) -> None:
    tracing = {"dynamic_batch_size": True, "strict": False, "compiler_args": ["--fast-math", "none"]}
    pipeline = CompiledPipeline.from_pipeline(source("bert"), LENGTH, neuron=False, model_tracing_settings=tracing)

    assert [record.message for record in caplog.records if record.name.startswith("compileflow")] == [
        "torchscript does not have these tracing settings, which are ignored: "
        "dynamic_batch_size, strict, compiler_args"
    ]
    assert pipeline.model.compilation_specs == specs(1, LENGTH, "torchscript")
    with pytest.raises(SpecError, match="Did you mean batch_size"):
        CompiledModel.from_model(source("bert").model, batchsize=2, max_length=LENGTH, neuron=False)


def test_saved_pipeline_is_about_as_large_as_the_weights(
    compiled_pipeline: Callable[..., CompiledPipeline], tmp_path: Path
) -> None:
    pipeline = compiled_pipeline("bert", 4)
    folder = pipeline.save_pretrained(tmp_path / "saved", original=False)
    weights = sum(p.numel() * p.element_size() for p in pipeline.original_pipeline.model.parameters())

    sizes = {path.name: path.stat().st_size for path in folder.rglob("*") if path.is_file()}

    assert not {"model.safetensors", "pytorch_model.bin"} & set(sizes)
    assert {"tokenizer.json", "tokenization_settings.json", "config.json"} <= set(sizes)
    assert weights < sum(sizes.values()) < 2 * weights
    assert CompiledPipeline.from_pretrained(folder).original_pipeline is None


class TestTargets:
    def test_neuron_without_its_toolchain_names_both_ways_out(
        self, source: Sources, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hide_distributions(monkeypatch, "torch-neuron", "neuron-cc", "torch-neuronx", "neuronx-cc")
        with pytest.raises(TargetUnavailableError) as caught:
            CompiledModel.from_model(source("bert").model)

        assert "torch-neuron is not installed" in caught.value.message
        for way_out in ("torch-neuron==", "torch-neuronx==", "neuron=False", "target=", "openvino"):
            assert way_out in caught.value.hint

    def test_neuron_compiles_with_its_toolchain(
        self, source: Sources, vendor_doubles: Path, tmp_path: Path
    ) -> None:
        original = source("bert")
        pipeline = CompiledPipeline.from_pipeline(
            original, LENGTH, 2, model_tracing_settings={"dynamic_batch_size": False}
        )
        loaded = CompiledPipeline.from_pretrained(pipeline.save_pretrained(tmp_path / "saved"))

        for item in (pipeline, loaded):
            assert item.model.compilation_specs == specs(2, LENGTH, "neuron", dynamic_batch_size=False)
            assert_same_result(item(TEXTS[:3]), original(TEXTS[:3], truncation=True, max_length=LENGTH))

    @pytest.mark.slow
    def test_any_other_target_can_be_named(self, source: Sources, tmp_path: Path) -> None:
        original = source("bert")
        pipeline = CompiledPipeline.from_pipeline(original, LENGTH, batch_size=2, target="openvino")
        loaded = CompiledPipeline.from_pretrained(pipeline.save_pretrained(tmp_path / "saved"))

        for item in (pipeline, loaded):
            assert item.model.compilation_specs == specs(2, LENGTH, "openvino")
            assert_same_result(item(TEXTS[:3]), original(TEXTS[:3], truncation=True, max_length=LENGTH))


class ShiftedBertForSequenceClassification(transformers.BertForSequenceClassification):
    """Answers otherwise than the class that its saved form is loaded as."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        answer = super().forward(*args, **kwargs)
        answer.logits = answer.logits + 0.5
        return answer


class TestValidation:
    @pytest.fixture
    def shifted(self, tiny_model: ModelFactory) -> Any:
        return ShiftedBertForSequenceClassification.from_pretrained(tiny_model(TASK))

    def test_model_that_answers_otherwise_is_refused_and_leaves_nothing(
        self, shifted: Any, file_home: Path
    ) -> None:
        before = everything_below(file_home)
        with pytest.raises(VerdictError, match=r"logits\[\d, \d\] = .*the limit is 0\.01 \+ 0\.01 \*") as caught:
            CompiledModel.from_model(shifted, max_length=LENGTH, neuron=False)

        assert "The difference is 0.5" in caught.value.message
        assert "validation_atol" in caught.value.hint
        assert everything_below(file_home) == before

    def test_tolerance_is_the_callers(self, shifted: Any) -> None:
        asked: dict[str, Any] = {"max_length": LENGTH, "neuron": False}

        CompiledModel.from_model(shifted, validation_atol=0.6, **asked)
        CompiledModel.from_model(shifted, validate_compilation=False, **asked)
        with pytest.raises(VerdictError, match=r"the limit is 0\.4 \+"):
            CompiledModel.from_model(shifted, validation_atol=0.4, **asked)

    def test_model_that_answers_nan_is_refused_at_any_tolerance(self, source: Sources) -> None:
        model = source("bert").model
        with torch.no_grad():
            model.classifier.bias[1] = float("nan")

        with pytest.raises(VerdictError, match=r"logits\[0, 1\] of the source model is nan"):
            CompiledModel.from_model(
                model, max_length=LENGTH, neuron=False, validation_rtol=1e9, validation_atol=1e9
            )

    def test_inputs_are_full_ragged_short_and_natural_and_never_all_masked(
        self, source: Sources, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original = source("bert")
        seen: list[Any] = []
        compare = local_compile.compare_with_source

        def watched(*args: Any, **kwargs: Any) -> None:
            original.model.register_forward_pre_hook(
                lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
            )
            compare(*args, **kwargs)

        monkeypatch.setattr(local_compile, "compare_with_source", watched)
        CompiledPipeline.from_pipeline(original, LENGTH, 2, neuron=False)

        lengths = [mask.sum(1).tolist() for mask in seen]
        assert all(min(item) > 0 for item in lengths)
        assert [LENGTH, LENGTH] in lengths
        assert [1] in lengths
        assert sum(len(set(item)) > 1 for item in lengths) == 2

    @pytest.mark.parametrize(
        ("candidate", "says"),
        [
            ([[1.0, 2.0], [3.0, float("inf")]], r"logits\[1, 1\] of the compiled model is inf"),
            ([[1.0, 2.0], [3.5, 4.0]], r"expected logits\[1, 0\] = 3, got 3\.5"),
            ([[1.0, 2.0]], r"expected logits of shape \(2, 2\), got shape \(1, 2\)"),
        ],
    )
    def test_error_names_the_worst_element(self, candidate: list[list[float]], says: str) -> None:
        reference = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
        with pytest.raises(VerdictError, match=says):
            self._check(("batch", 2), reference, np.array(candidate, np.float32))
        self._check(("batch", 2), reference, reference + np.float32(0.01))

    @pytest.mark.parametrize(("difference", "advised"), [(0.5, True), (0.9, True), (1.1, False), (50.0, False)])
    def test_wider_tolerance_is_advised_only_for_small_differences(self, difference: float, advised: bool) -> None:
        reference = np.zeros((1, 2), np.float32)
        with pytest.raises(VerdictError) as caught:
            self._check(("batch", 2), reference, reference + np.float32(difference))
        assert ("validation_rtol" in caught.value.hint) is advised

    def test_masked_positions_are_not_compared_and_counted_ones_are(self) -> None:
        reference = np.zeros((2, 3, 4), np.float32)
        mask = np.array([[1, 1, 0], [1, 0, 0]])
        for at, refused in (((0, 2, 1), False), ((1, 1, 0), False), ((1, 0, 3), True)):
            candidate = reference.copy()
            candidate[at] = float("nan")
            if refused:
                with pytest.raises(VerdictError, match=re.escape(str(list(at)))):
                    self._check(("batch", "sequence", 4), reference, candidate, mask)
            else:
                self._check(("batch", "sequence", 4), reference, candidate, mask)

    @staticmethod
    def _check(axes: tuple[Any, ...], reference: Any, candidate: Any, mask: Any = None) -> None:
        record = TensorRecord(name="logits", dtype="float32", axes=axes)
        check_output(
            record, reference, candidate, mask=mask, tolerance=Tolerance(1e-2, 1e-2), case="On this input"
        )


def test_code_of_the_page_runs(
    tiny_model: ModelFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = ROOT / "docs" / "how-to" / "move-from-the-older-library.md"
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    (tmp_path / "my-model").symlink_to(tiny_model(TASK))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}

    for block in blocks:
        exec(compile(block, page.name, "exec"), names)  # noqa: S102 - our own page

    assert len(blocks) >= 3
    assert "'target': 'torchscript'" in capsys.readouterr().out
