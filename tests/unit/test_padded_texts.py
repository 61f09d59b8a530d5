"""A pipeline whose answers change when its tokenizer pads a text is refused before the compile, with the cause."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import transformers

from compileflow import CompiledPipeline, HfTask
from compileflow.errors import SpecError, VerdictError
from compileflow.local import in_memory as local_compile
from compileflow.testing.pipelines import assert_same_result
from tests.conftest import ModelFactory
from tests.models import sentences

pytestmark = pytest.mark.usefixtures("file_home")
LENGTH = 16
TASK = HfTask.TEXT_CLASSIFICATION
TEXTS = ["the", "the order", sentences()[0]]
SMALL = {"vocab_size": 600, "num_labels": 3, "initializer_range": 0.3}

Sources = Callable[..., Any]


@pytest.fixture
def source(tiny_model: ModelFactory) -> Sources:
    """Return a text-classification pipeline of a family with random weights and the tiny tokenizer."""

    def load(family: str, **fields: Any) -> Any:
        folder = tiny_model(TASK)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        if family == "bert":
            model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
        else:
            transformers.set_seed(0)
            config = transformers.AutoConfig.for_model(family, **SMALL, **fields)
            model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
        return transformers.pipeline(TASK.value, model=model, tokenizer=tokenizer)

    return load


@pytest.fixture
def decoder(source: Sources) -> Any:
    """A GPT-2, which reads its answer off the last token that is not padding."""
    return source("gpt2", n_embd=32, n_layer=1, n_head=2, n_positions=LENGTH, bos_token_id=1, eos_token_id=1)


def compiled(original: Any, **settings: Any) -> CompiledPipeline:
    return CompiledPipeline.from_pipeline(original, max_length=LENGTH, batch_size=2, neuron=False, **settings)


def assert_answers_stay(original: Any) -> None:
    pipeline = compiled(original)
    for text in TEXTS:
        assert_same_result(pipeline(text), original(text, truncation=True, max_length=LENGTH))


def test_padding_token_that_the_model_does_not_know_is_refused(decoder: Any) -> None:
    decoder.model.config.pad_token_id = 5

    with pytest.raises(
        SpecError, match=r"pads with the token 0, but pad_token_id of the model's configuration is 5"
    ) as caught:
        compiled(decoder)
    assert "model.config.pad_token_id = 0" in caught.value.hint
    decoder.model.config.pad_token_id = 0
    assert_answers_stay(decoder)


def test_configuration_without_a_padding_token_gets_that_of_the_tokenizer(decoder: Any) -> None:
    decoder.model.config.pad_token_id = None

    assert_answers_stay(decoder)
    assert decoder.model.config.pad_token_id is None


def test_padding_on_the_wrong_side_is_refused(source: Sources) -> None:
    original = source("bert")
    original.tokenizer.padding_side = "left"

    with pytest.raises(SpecError, match=r"padding changes .*: the padding is on the left\.") as caught:
        compiled(original)
    assert "tokenizer.padding_side = 'right'" in caught.value.hint
    original.tokenizer.padding_side = "right"
    with pytest.raises(SpecError, match="the padding is on the left"):
        compiled(original, tokenizer_settings={"padding_side": "left"})


@pytest.mark.parametrize("validate", [True, False])
def test_tokenizer_without_a_padding_token_is_refused_before_the_compile(decoder: Any, validate: bool) -> None:
    decoder.tokenizer.pad_token = None
    decoder.model.config.pad_token_id = None

    with pytest.raises(SpecError, match="has no padding token, but torchscript pads") as caught:
        compiled(decoder, validate_compilation=validate)
    assert caught.value.hint.startswith("Set pad_token before the compile")


def test_model_that_no_padding_leaves_alone_is_refused(source: Sources) -> None:
    fields = {"num_hidden_layers": 3, "num_attention_heads": 2, "conv_kernel_size": 5}
    original = source("convbert", embedding_size=32, hidden_size=32, **fields)

    with pytest.raises(SpecError, match="its attention mask does not hide the padding") as caught:
        compiled(original)
    assert "tokenizer_settings={'padding': False}" in caught.value.hint
    assert "onnx-runtime" in caught.value.hint
    with pytest.raises(SpecError, match="torchscript pads each input to a fixed length"):
        compiled(original, tokenizer_settings={"padding": False})


def test_compiled_pipeline_is_compared_on_texts_without_padding(
    source: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check before the compile is skipped, so that only the comparison of the compiled model can refuse."""
    original = source("bert")
    original.tokenizer.padding_side = "left"
    run_in_child = local_compile.run_in_child

    def without_check(function: str, request: dict[str, Any], **settings: Any) -> Any:
        return run_in_child(function, {**request, "padding": None}, **settings)

    monkeypatch.setattr(local_compile, "run_in_child", without_check)
    with pytest.raises(VerdictError, match=r"On a text of \d tokens, expected logits"):
        compiled(original)
