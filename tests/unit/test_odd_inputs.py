"""Inputs that nobody should send: the source model's answer, or its kind of error in clear words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from compileflow import CompiledModel, CompiledPipeline, HfTask
from compileflow.errors import InputError
from compileflow.testing.pipelines import assert_same_result
from tests.conftest import ModelFactory
from tests.in_process import InProcess
from tests.models import MAX_TOKENS, sentences

pytestmark = pytest.mark.filterwarnings(r"ignore:.*torch\.jit\..*deprecated")

TASK = HfTask.TEXT_CLASSIFICATION
TEXTS = sentences()


@pytest.fixture(scope="module")
def artifact(tiny_model: ModelFactory, in_process: InProcess) -> Path:
    return in_process.compiled(tiny_model(TASK), "torchscript", TASK)


@pytest.fixture(scope="module")
def pipeline(artifact: Path) -> CompiledPipeline:
    return CompiledPipeline.from_pretrained(artifact)


@pytest.fixture(scope="module")
def reference(tiny_model: ModelFactory) -> Any:
    return transformers.pipeline(TASK.value, model=str(tiny_model(TASK)))


def outcome(call: Callable[[], Any]) -> Any:
    """Return what a call answers, or the error that it raises."""
    try:
        return call()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is compared
        return error


@pytest.mark.parametrize(
    "inputs",
    [
        "",
        [""],
        ["", "a"],
        " \t\n",
        {"text": "a", "text_pair": "b"},
        [{"text": "a", "text_pair": "b"}, {"text": "", "text_pair": ""}],
        ("a", "b"),
        [("a", "b")],
        [[["a", "b"]]],
        "nul\x00 and \x07 bell",
        "e\u0301 \u200b \U0001f468\u200d\U0001f469\u200d\U0001f467",
    ],
    ids=repr,
)
def test_odd_texts_get_the_source_models_answer(pipeline: CompiledPipeline, reference: Any, inputs: Any) -> None:
    assert_same_result(pipeline(inputs), reference(inputs))


@pytest.mark.parametrize(
    "inputs",
    [
        None, b"bytes", 5, {"a"}, {"txt": "a"}, ["a", None], [b"a", "b"], [["a", "b"]], [], "\ud800",
        ["fine", "\ud800"],
    ],
    ids=ascii,
)  # fmt: skip
def test_what_is_no_text_gets_the_source_models_kind_of_error(
    pipeline: CompiledPipeline, reference: Any, inputs: Any
) -> None:
    expected, result = outcome(lambda: reference(inputs)), outcome(lambda: pipeline(inputs))
    assert isinstance(expected, Exception)
    assert isinstance(result, type(expected)), repr(result)
    assert str(result)


def test_nothing_at_all_is_the_same_type_error(pipeline: CompiledPipeline, reference: Any) -> None:
    assert type(outcome(pipeline)) is type(outcome(reference)) is TypeError


def test_one_bad_text_of_many_spoils_no_later_call(pipeline: CompiledPipeline, reference: Any) -> None:
    assert isinstance(outcome(lambda: pipeline([*TEXTS[:9], None])), ValueError)
    assert_same_result(pipeline(TEXTS[:9]), reference(TEXTS[:9], truncation=True))


def test_a_hundred_thousand_characters_are_truncated(pipeline: CompiledPipeline, reference: Any) -> None:
    long = (" ".join(TEXTS) * 10)[:100_000]
    assert len(long) == 100_000
    assert_same_result(pipeline(long), reference(long, truncation=True))
    assert_same_result(pipeline(["short", long]), reference(["short", long], truncation=True))


@pytest.mark.slow
def test_ten_thousand_texts_come_back_in_order(pipeline: CompiledPipeline, reference: Any) -> None:
    some = [TEXTS[number * 37 % len(TEXTS)][: 5 + number % 40] for number in range(50)]
    answers = pipeline(some * 200)
    assert len(answers) == 10_000
    once = reference(some)
    for start in (0, 5000, 9950):
        assert_same_result(answers[start : start + 50], once)


IDS = torch.tensor([[2, 60, 61, 3]])


@pytest.fixture(scope="module")
def model(artifact: Path) -> CompiledModel:
    return CompiledModel.from_pretrained(artifact)


@pytest.fixture(scope="module")
def source(reference: Any) -> Any:
    return reference.model


class TestModel:
    @pytest.mark.parametrize(
        "inputs",
        [
            {"input_ids": IDS},
            {"input_ids": IDS.int()},
            {"input_ids": IDS, "attention_mask": IDS > 2},
            {"input_ids": IDS, "attention_mask": (IDS > 2).float()},
            {"input_ids": IDS.repeat(9, 1), "token_type_ids": torch.ones(9, 4, dtype=torch.long)},
            {"input_ids": IDS.T.contiguous().T, "attention_mask": None},
        ],
        ids=lambda inputs: ", ".join(f"{name} {getattr(value, 'dtype', value)}" for name, value in inputs.items()),
    )
    def test_answers_what_the_source_model_answers(
        self, model: CompiledModel, source: Any, inputs: dict[str, Any]
    ) -> None:
        with torch.inference_mode():
            expected = source(**inputs).logits
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize(
        ("inputs", "says"),
        [
            ({}, "without input_ids"),
            (
                {"input_ids": IDS.float()},
                r"expected integers of shape \(batch, sequence\), got float32 of shape \(1, 4\)",
            ),
            ({"input_ids": IDS.bool()}, "got bool"),
            ({"input_ids": IDS[0]}, r"shape \(4,\)"),
            ({"input_ids": IDS[:0]}, r"shape \(0, 4\)"),
            ({"input_ids": torch.ones(1, MAX_TOKENS + 1, dtype=torch.long)}, "65 tokens.*at most 64"),
            ({"input_ids": IDS.to("meta")}, "meta device holds no data"),
            ({"input_ids": IDS, "attention_mask": torch.full((1, 4), 0.5)}, "attention_mask: .*got float32"),
            ({"input_ids": [[1, 2], [3]]}, "different lengths"),
            ({"input_ids": IDS, "inputs_embeds": torch.ones(1, 4, 32)}, "no input 'inputs_embeds'"),
        ],
    )
    def test_refuses_the_rest_as_a_value_error(
        self, model: CompiledModel, inputs: dict[str, Any], says: str
    ) -> None:
        with pytest.raises(InputError, match=says) as caught:
            model(**inputs)
        assert isinstance(caught.value, ValueError)
        assert caught.value.hint

    def test_refuses_to_answer_once_closed(self, artifact: Path) -> None:
        closed = CompiledPipeline.from_pretrained(artifact)
        closed.model.close()
        for inputs in ("a", ["a", "b"]):
            with pytest.raises(InputError, match="was closed"):
                closed(inputs)
