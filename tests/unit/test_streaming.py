"""generate_yield and TextStreamer: pieces as they are written, and what ends a generation early."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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


@pytest.mark.parametrize("first", ["generate_yield", "generate"])
@pytest.mark.parametrize("second", ["generate_yield", "generate"])
def test_streamer_takes_one_text_at_a_time(
    model: Any,
    tokenizer: Any,
    new_ids: list[int],
    monkeypatch: pytest.MonkeyPatch,
    first: str,
    second: str,
) -> None:
    inputs, streamer = tokenizer(TEXTS[0], return_tensors="pt"), TextStreamer(tokenizer, use_print=False)
    reads, may_read, read = threading.Semaphore(0), threading.Event(), EagerContinuation.read

    def read_later(self: Any, *args: Any, **kwargs: Any) -> Any:
        reads.release()
        assert may_read.wait(30)
        return read(self, *args, **kwargs)

    def write(method: str) -> Any:
        pieces = getattr(model, method)(**inputs, streamer=streamer, **GREEDY)
        return list(pieces) if method == "generate_yield" else pieces

    monkeypatch.setattr(EagerContinuation, "read", read_later)
    with ThreadPoolExecutor(1) as pool:
        text = pool.submit(write, first)
        assert reads.acquire(timeout=30)
        with pytest.raises(InputError, match=r"takes the text of another generation.*closing its iterator"):
            write(second)
        may_read.set()
        pieces = text.result() if first == "generate_yield" else list(streamer)
    assert "".join(pieces) == tokenizer.decode(new_ids)
    # The refusal and the end leave the streamer as it was.
    assert "".join(model.generate_yield(**inputs, streamer=streamer, **GREEDY)) == tokenizer.decode(new_ids)


def test_threads_share_a_model_with_a_streamer_each(
    model: Any, tokenizer: Any, tiny_model: Callable[..., Path]
) -> None:
    eager = transformers.AutoModelForCausalLM.from_pretrained(tiny_model(TASK))
    texts = [*TEXTS, "on time"]
    inputs = [tokenizer(text, return_tensors="pt") for text in texts]
    new_ids = [eager.generate(**row, **GREEDY)[0, row["input_ids"].shape[1] :].tolist() for row in inputs]
    ready = threading.Barrier(2 * len(texts))

    def ids_of(row: Any) -> list[int]:
        ready.wait(30)
        return list(model.generate_yield(**row, **GREEDY))

    def text_of(row: Any) -> str:
        ready.wait(30)
        streamer = TextStreamer(tokenizer, use_print=False)
        return "".join(model.generate_yield(**row, streamer=streamer, **GREEDY))

    with ThreadPoolExecutor(2 * len(texts)) as pool:
        ids, written = pool.map(ids_of, inputs), pool.map(text_of, inputs)
        assert list(ids) == new_ids
        assert list(written) == [tokenizer.decode(row) for row in new_ids]


def test_text_after_a_failed_generation_has_no_words_of_it(
    model: Any, tokenizer: Any, new_ids: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(ids: Any, scores: Any, **_: Any) -> Any:
        raise RuntimeError("stopped")

    inputs, streamer = tokenizer(TEXTS[0], return_tensors="pt"), TextStreamer(tokenizer)
    with pytest.raises(RuntimeError, match="stopped"):
        model.generate(**inputs, streamer=streamer, stopping_criteria=[fail], **GREEDY)
    capsys.readouterr()
    model.generate(**inputs, streamer=streamer, **GREEDY)
    assert capsys.readouterr().out == tokenizer.decode(new_ids) + "\n"


def test_prompt_and_mask_can_be_lists(model: Any, tokenizer: Any, new_ids: list[int]) -> None:
    assert list(model.generate_yield(**tokenizer(TEXTS[0]), **GREEDY)) == new_ids


@pytest.mark.parametrize(
    ("ids", "settings", "says"),
    [
        ([[1, 2], [3, 4]], {}, "takes one prompt, got 2"),
        ([[1], [2, 3]], {}, r"rows of the same length, got \[\[1\], \[2, 3\]\]"),
        ("abc", {}, "input_ids as integers of shape .*, got 'abc'.*Tokenize the prompt"),
        ([], {}, r"input_ids as integers of shape .*, got float64 of shape \(0,\)"),
        (None, {}, "got nothing"),
        ([{"role": "user", "content": "it"}], {}, r"got \[\{'role'"),
        ({"input_ids": [1]}, {}, r"got \{'input_ids'"),
        ([99_999], {}, "got 99999 to 99999"),
        ([2**63], {}, "Expected token ids from 0 to"),
        ([1, 2], {"streamer": print}, "cannot read from a value of the type builtin"),
        ([1, 2], {"streamer": "words"}, "cannot read from 'words'"),
        ([1, 2], {"attention_mask": [1]}, r"attention_mask has shape \(1, 1\), but input_ids has shape \(1, 2\)"),
        ([1, 2], {"attention_mask": "all"}, "attention_mask as a tensor of shape .*, got 'all'"),
        ([1, 2], {"num_return_sequences": 2, "do_sample": True}, "token ids of one text, got int64 of shape"),
    ],
)
def test_wrong_call_is_refused(model: Any, ids: Any, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        list(model.generate_yield(ids, **settings))


@pytest.mark.parametrize("tokenizer", [None, "my-model"])
def test_streamer_without_a_tokenizer_is_refused(tokenizer: Any) -> None:
    with pytest.raises(InputError, match=f"Expected the tokenizer of the model, got {tokenizer!r}"):
        TextStreamer(tokenizer)


@pytest.mark.parametrize("value", [None, "word", [], [[1], [2]], 0.5])
def test_streamer_takes_token_ids_only(tokenizer: Any, value: Any) -> None:
    with pytest.raises(InputError, match="A streamer takes the token ids of one text, got "):
        TextStreamer(tokenizer).put(value)
