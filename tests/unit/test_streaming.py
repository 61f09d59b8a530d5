"""generate_yield and TextStreamer: pieces as they are written, and what ends a generation early."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from compileflow import CompiledModel, TextStreamer
from compileflow.errors import InputError
from compileflow.source_model import load_source_model
from tests.decoders import GREEDY, TASK, TEXTS, EagerContinuation, eager_component


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Callable[..., Path]) -> Any:
    """The tokenizer of the small decoder."""
    return transformers.AutoTokenizer.from_pretrained(tiny_model(TASK))


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Any:
    """A compiled model whose graph is the small decoder itself."""
    folder = tiny_model(TASK)
    return CompiledModel.from_component(eager_component(folder, load_source_model(folder, TASK)))


@pytest.fixture(scope="module")
def new_ids(tiny_model: Callable[..., Path], tokenizer: Any) -> list[int]:
    """What transformers itself writes after the first text."""
    eager = transformers.AutoModelForCausalLM.from_pretrained(tiny_model(TASK))
    inputs = tokenizer(TEXTS[0], return_tensors="pt")
    return eager.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :].tolist()  # type: ignore[no-any-return]


def test_token_ids_are_yielded(model: Any, tokenizer: Any, new_ids: list[int]) -> None:
    ids = tokenizer.encode(TEXTS[0])
    assert list(model.generate_yield(ids, **GREEDY)) == new_ids
    assert list(model.generate_yield(**tokenizer(TEXTS[0], return_tensors="pt"), **GREEDY)) == new_ids
    assert list(model.generate_yield(ids, max_length=len(ids) + 3, do_sample=False)) == new_ids[:3]


def test_texts_are_yielded_as_whole_words(model: Any, tokenizer: Any, new_ids: list[int]) -> None:
    streamer = TextStreamer(tokenizer, use_print=False, skip_special_tokens=True)
    pieces = list(model.generate_yield(tokenizer.encode(TEXTS[0]), streamer=streamer, **GREEDY))
    assert "".join(pieces) == tokenizer.decode(new_ids, skip_special_tokens=True)
    assert len(pieces) > 3


def test_events_are_those_of_a_server(model: Any, tokenizer: Any, new_ids: list[int]) -> None:
    streamer = TextStreamer(tokenizer, use_print=False, use_sse=True)
    events = list(model.generate_yield(tokenizer.encode(TEXTS[0]), streamer=streamer, **GREEDY))
    data = [event.removeprefix("data: ").removesuffix("\n\n") for event in events]
    assert all(f"data: {line}\n\n" == event for line, event in zip(data, events, strict=True))
    assert data.pop() == "[DONE]"
    assert "".join(map(json.loads, data)) == tokenizer.decode(new_ids)


def test_generate_prints_the_text(
    model: Any, tokenizer: Any, new_ids: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    model.generate(**tokenizer(TEXTS[0], return_tensors="pt"), streamer=TextStreamer(tokenizer), **GREEDY)
    assert capsys.readouterr().out == tokenizer.decode(new_ids) + "\n"


def test_closing_ends_the_generation(
    model: Any, tokenizer: Any, new_ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    read = EagerContinuation.read

    def read_slowly(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        time.sleep(0.02)
        return read(self, *args, **kwargs)

    monkeypatch.setattr(EagerContinuation, "read", read_slowly)
    pieces = model.generate_yield(tokenizer.encode(TEXTS[0]), max_new_tokens=50, do_sample=False)
    assert next(pieces) == new_ids[0]
    pieces.close()
    assert len(calls) < 50
    assert not [thread for thread in threading.enumerate() if thread.name == "generate_yield"]


def test_streamer_forgets_a_text_that_ended_early(model: Any, tokenizer: Any, new_ids: list[int]) -> None:
    ids, streamer = tokenizer.encode(TEXTS[0]), TextStreamer(tokenizer, use_print=False)
    pieces = model.generate_yield(ids, streamer=streamer, **GREEDY)
    next(pieces)
    pieces.close()
    assert "".join(model.generate_yield(ids, streamer=streamer, **GREEDY)) == tokenizer.decode(new_ids)


def test_error_of_the_generation_is_raised_where_the_pieces_are_read(model: Any, tokenizer: Any) -> None:
    with pytest.raises(InputError, match="prompt has 64 tokens"):
        list(model.generate_yield(torch.full((1, 64), 20), max_new_tokens=1))


@pytest.mark.parametrize(
    ("ids", "streamer", "says"),
    [([[1, 2], [3, 4]], None, "takes one prompt, got 2"), ([1, 2], print, "cannot read from a builtin")],
)
def test_wrong_call_is_refused(model: Any, ids: Any, streamer: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        list(model.generate_yield(ids, streamer=streamer))
