"""GeneratingModel writes what transformers writes, whatever reads the tokens; faults of a reader are found."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from compileflow import CompiledModel, CompiledPipeline
from compileflow.errors import InputError
from compileflow.source_model import SourceModel, load_source_model
from compileflow.spec import Precision
from compileflow.validation.judge.suite import gates_for
from compileflow.validation.measure import Measurements
from compileflow.validation.measure.generation import Prompts, measure_generation, measure_pieces
from compileflow.validation.writing import ComponentReader, ModelWriter
from tests.decoders import (
    CHAT,
    GREEDY,
    TASK,
    TEXTS,
    EagerContinuation,
    EndIgnored,
    MaskIgnored,
    PositionsOffByOne,
    ReorderDropped,
    RowsExchanged,
    StaleCache,
    eager_component,
)
from tests.models import MAX_TOKENS, build_decoder

TinyModel = Callable[..., Path]


@pytest.fixture(scope="session")
def source(tiny_model: TinyModel) -> SourceModel:
    """The small decoder."""
    return load_source_model(tiny_model(TASK), TASK)


@pytest.fixture(scope="session")
def eager(tiny_model: TinyModel) -> Any:
    """The same, loaded with transformers itself."""
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_model(TASK)).eval()


@pytest.fixture(scope="session")
def model(tiny_model: TinyModel, source: SourceModel) -> Any:
    """A compiled model whose graph is the small decoder itself."""
    return CompiledModel.from_component(eager_component(tiny_model(TASK), source))


@pytest.fixture(scope="session")
def tokens(tiny_model: TinyModel) -> Callable[[list[str]], Any]:
    """Tokenize prompts with transformers itself, padded on the left."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model(TASK), padding_side="left")
    return lambda texts: tokenizer(texts, return_tensors="pt", padding=True)


class Chunks:
    """Collects what a streamer gets."""

    def __init__(self) -> None:
        self.ids: list[int] = []

    def put(self, value: Any) -> None:
        """Add tokens."""
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        """Mark the end."""
        self.ids.append(-1)


class StopAt(transformers.StoppingCriteria):
    """Stops at a length."""

    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Return whether each row has the length."""
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 2},
        {"num_beams": 3, "num_return_sequences": 2},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"use_cache": False},
        {"bad_words_ids": [[100], [101]]},
        {"logits_processor": transformers.LogitsProcessorList([transformers.TemperatureLogitsWarper(0.5)])},
        {"stopping_criteria": transformers.StoppingCriteriaList([StopAt(24)])},
        {"prefill_chunk_size": 2},
    ],
    ids=lambda settings: " ".join(settings) or "greedy",
)
@pytest.mark.parametrize("rows", [1, 3])
def test_same_tokens(model: Any, eager: Any, tokens: Any, settings: dict[str, Any], rows: int) -> None:
    inputs = tokens(TEXTS[:rows])
    expected = eager.generate(**inputs, **(GREEDY | settings))
    assert model.generate(**inputs, **(GREEDY | settings)).tolist() == expected.tolist()


def test_torch_has_one_thread_while_the_model_writes(model: Any, tokens: Any) -> None:
    """Threads of torch spin after each operation and slow the graph down."""
    counts: list[int] = []

    def count(ids: Any, scores: Any) -> Any:
        counts.append(torch.get_num_threads())
        return scores

    def write(_: int) -> None:
        model.generate(**tokens(TEXTS[:1]), **GREEDY, logits_processor=[count])

    earlier_count = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(write, range(8)))
        write(0)
        assert set(counts) == {1}
        with ThreadPoolExecutor(1) as pool:
            assert (torch.get_num_threads(), pool.submit(torch.get_num_threads).result()) == (3, 3)
    finally:
        torch.set_num_threads(earlier_count)


def test_same_samples(model: Any, eager: Any, tokens: Any) -> None:
    def sample(model: Any) -> Any:
        torch.manual_seed(7)
        settings = {"do_sample": True, "top_k": 20, "temperature": 1.3, "num_return_sequences": 2}
        return model.generate(**tokens(TEXTS), max_new_tokens=16, **settings).tolist()

    assert sample(model) == sample(eager)


def test_streamer_gets_each_token(model: Any, eager: Any, tokens: Any) -> None:
    def stream(model: Any) -> list[int]:
        chunks = Chunks()
        model.generate(**tokens(TEXTS[:1]), streamer=chunks, **GREEDY)
        return chunks.ids

    assert stream(model) == stream(eager)


def test_each_text_ends_with_an_end_token(model: Any, eager: Any, tokens: Any) -> None:
    inputs = tokens(TEXTS)
    new_tokens = eager.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    ends = [int(new_tokens[0, 2]), int(new_tokens[1, 5])]
    expected = eager.generate(**inputs, **GREEDY, eos_token_id=ends)
    assert model.generate(**inputs, **GREEDY, eos_token_id=ends).tolist() == expected.tolist()


def test_rows_go_on_from_an_earlier_answer(model: Any, eager: Any, tokens: Any) -> None:
    def turn(model: Any) -> Any:
        answer = model.generate(**tokens(TEXTS[:1]), **GREEDY, return_dict_in_generate=True)
        prompt = torch.cat([answer.sequences, torch.tensor([[30, 40, 50]])], dim=1)
        past = answer.past_key_values
        return model.generate(
            prompt, attention_mask=torch.ones_like(prompt), past_key_values=past, **GREEDY
        ).tolist()

    assert turn(model) == turn(eager)


def test_other_number_of_rows_does_not_go_on_from_an_earlier_answer(model: Any, tokens: Any) -> None:
    answer = model.generate(**tokens(TEXTS[:2]), **GREEDY, return_dict_in_generate=True)
    prompt = torch.cat([answer.sequences[:1], torch.tensor([[30, 40]])], dim=1)
    with pytest.raises(InputError, match="Expected 2 rows, as many as past_key_values holds, got 1"):
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), past_key_values=answer.past_key_values, **GREEDY
        )


def test_threads_keep_their_own_rows(model: Any, eager: Any, tokens: Any) -> None:
    inputs = [tokens([text]) for text in (*TEXTS, "on time")]
    expected = [eager.generate(**row, **GREEDY).tolist() for row in inputs]
    ready = threading.Barrier(len(inputs))

    def ask(row: Any) -> Any:
        ready.wait()
        return model.generate(**row, **GREEDY).tolist()

    with ThreadPoolExecutor(len(inputs)) as pool:
        assert list(pool.map(ask, inputs)) == expected


def test_generation_ends_at_the_longest_row(model: Any, tokens: Any, caplog: pytest.LogCaptureFixture) -> None:
    answer = model.generate(**tokens(TEXTS[:1]), do_sample=False, max_new_tokens=200)
    assert answer.shape[1] <= MAX_TOKENS
    assert f"generation ends at {MAX_TOKENS} tokens" in caplog.text


def test_prompt_without_room_is_refused(model: Any) -> None:
    with pytest.raises(InputError, match=f"prompt has {MAX_TOKENS} tokens") as caught:
        model.generate(torch.full((1, MAX_TOKENS), 20), max_new_tokens=1)
    assert "larger maximum length" in caught.value.hint


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"input_ids": [[1, 2]], "labels": [[1, 2]]}, "no input labels"),
        ({"input_ids": [[1, 2]], "output_attentions": True}, "output_attentions=True"),
        ({"input_ids": [[1, 99_999]]}, "got 1 to 99999"),
        ({"input_ids": [[20] * (MAX_TOKENS + 1)]}, f"compiled for {MAX_TOKENS} tokens, got {MAX_TOKENS + 1}"),
        ({"inputs_embeds": [[0.5]]}, "no input inputs_embeds"),
        ({"input_ids": [[]]}, "integers of shape"),
        ({}, "got nothing"),
        ({"input_ids": [[1, 2]], "past_key_values": "mine"}, "keeps its own cache"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]], "use_cache": True}, "attention_mask of shape"),
        ({"input_ids": [[1, 2]], "attention_mask": [[0.0, -1.0]]}, "attention_mask of 0 for padding and 1"),
    ],
)
def test_wrong_call_is_refused(model: Any, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        model(**arguments)


def test_mask_of_floats_is_a_mask(model: Any, tokens: Any) -> None:
    inputs = tokens(TEXTS)
    masks = [inputs["attention_mask"].to(dtype) for dtype in (torch.int64, torch.float32, torch.bool)]
    answers = [model.generate(inputs["input_ids"], attention_mask=mask, **GREEDY).tolist() for mask in masks]
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_rows_that_were_read_are_neither_copied_nor_shortened(model: Any, tokens: Any) -> None:
    inputs = tokens(TEXTS[:1])
    past = model(**inputs, use_cache=True).past_key_values
    for change, says in (
        (lambda: copy.copy(past), "cannot be copied"),
        (lambda: copy.deepcopy(past), "cannot be copied"),
        (lambda: past.crop(2), "cannot forget tokens"),
        (lambda: model(torch.empty((1, 0), dtype=torch.int64), past_key_values=past), "the prompt has no more"),
    ):
        with pytest.raises(InputError, match=says):
            change()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"inputs": "abc"}, "input_ids as a tensor of shape .*, got 'abc'.*return_tensors"),
        ({"input_ids": [[1, 2]]}, r"input_ids as a tensor of shape .*, got \[\[1, 2\]\]"),
        ({"input_ids": torch.tensor([[1, 2]]), "attention_mask": [[1, 1]]}, "attention_mask as a tensor"),
        (
            {"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.tensor([[1]])},
            r"attention_mask has shape \(1, 1\), but input_ids has shape \(1, 2\)",
        ),
        ({"input_ids": torch.tensor([[1, 2]]), "streamer": "words"}, "Expected a streamer, got 'words'"),
    ],
)
def test_generate_refuses_other_prompts(model: Any, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        model.generate(**arguments, max_new_tokens=1)


def test_other_cache_is_refused(model: Any, tokens: Any) -> None:
    with pytest.raises(InputError, match="keeps its own cache"):
        model.generate(**tokens(TEXTS), max_new_tokens=2, cache_implementation="static")


@pytest.mark.parametrize(
    ("prompt", "settings"),
    [
        (TEXTS, {}),
        (TEXTS, {"batch_size": 3}),
        (CHAT, {}),
        ([CHAT, CHAT], {}),
        ([*CHAT, {"role": "assistant", "content": "it is"}], {}),
        (TEXTS[0], {"return_full_text": False}),
        (TEXTS[0], {"num_return_sequences": 2, "num_beams": 2}),
        (TEXTS[0], {"stop_sequence": "the"}),
    ],
)
def test_pipeline_answers_like_transformers(
    model: Any, eager: Any, tiny_model: TinyModel, prompt: Any, settings: dict[str, Any]
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model(TASK))
    expected = transformers.pipeline("text-generation", model=eager, tokenizer=tokenizer, device="cpu")
    pipeline = CompiledPipeline.from_model(model, tokenizer=tokenizer)
    assert pipeline(prompt, **GREEDY, **settings) == expected(prompt, **GREEDY, **settings)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ([], r"a text, a chat, or a list of texts or of chats, got \[\]"),
        (None, "a list of texts or of chats, got None"),
        (5, "got 5"),
        (b"it", "got a value of the type bytes"),
        ({"role": "user", "content": "it"}, r"got \{'role': 'user'"),
        (("it",), r"got \('it',\)"),
        (torch.tensor([[1, 2]]), "got a value of the type Tensor"),
        (["it", None], "Expected prompt 1 as a text, got None"),
        ([[]], r"Expected prompt 0 as a chat, got \[\]"),
        ([CHAT, "it"], "Expected prompt 1 as a chat, got 'it'"),
        ([{"role": "user"}], 'message 0 of a chat with "role" and "content", got'),
        ([*CHAT, "it"], "message 1 of a chat .*, got 'it'"),
    ],
    ids=str,
)
def test_pipeline_refuses_what_is_no_prompt(model: Any, tiny_model: TinyModel, prompt: Any, says: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model(TASK))
    with pytest.raises(InputError, match=says) as caught:
        CompiledPipeline.from_model(model, tokenizer=tokenizer)(prompt)
    assert "\n" not in str(caught.value)


def test_prompts_of_a_generator_are_answered_one_by_one(model: Any, tiny_model: TinyModel) -> None:
    pipeline = CompiledPipeline.from_model(
        model, tokenizer=transformers.AutoTokenizer.from_pretrained(tiny_model(TASK))
    )
    assert list(pipeline((text for text in TEXTS), **GREEDY)) == pipeline(TEXTS, **GREEDY)


def test_chat_without_a_template_is_refused(model: Any, tiny_model: TinyModel) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model(TASK))
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        CompiledPipeline.from_model(model, tokenizer=tokenizer)(CHAT)


def measured(
    folder: Path,
    source: SourceModel,
    kind: type[EagerContinuation] = EagerContinuation,
    *,
    other: SourceModel | None = None,
    writer: type[ModelWriter] = ModelWriter,
) -> dict[str, float]:
    """Measure a reader against the source model.

    Args:
        folder: Folder of the source model.
        source: The source model.
        kind: Class that reads.
        other: Model that the reader reads with; None: the source model.
        writer: Class that writes with the compiled model.
    """
    component = eager_component(folder, other or source, kind)
    ids = range(20, 20 + 9 * 11)
    rows = [[*ids[9 * number : 9 * number + 3 + number % 6]] for number in range(11)]
    prompts = Prompts(rows, ["a text"] * len(rows), source.pad_token_id, MAX_TOKENS, 8)
    measurements = Measurements()
    measure_pieces(measurements, source.run, ComponentReader(component), prompts)
    reference = ModelWriter(source.model, source.pad_token_id, source.vocab_size)
    candidate = writer(CompiledModel.from_component(component), source.pad_token_id, source.vocab_size)
    measure_generation(measurements, reference, candidate, prompts, progress=lambda _: None)
    return measurements.scalars


def test_correct_reader_has_no_fault(tiny_model: TinyModel, source: SourceModel) -> None:
    scalars = measured(tiny_model(TASK), source)
    assert scalars.pop("piece_error") < 1e-5
    assert scalars == dict.fromkeys(scalars, 0.0)
    metrics = {gate.entry.metric for gate in gates_for(Precision.FP32, TASK, {})}
    assert {"piece_error", *scalars} <= metrics


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (PositionsOffByOne, "piece_error"),
        (StaleCache, "later_requests"),
        (MaskIgnored, "batch_rows"),
        (ReorderDropped, "beams"),
        (RowsExchanged, "generations"),
    ],
)
def test_fault_of_a_reader_is_found(
    tiny_model: TinyModel, source: SourceModel, kind: type[EagerContinuation], name: str
) -> None:
    StaleCache.earlier.clear()
    assert measured(tiny_model(TASK), source, kind)[name] > 1e-3


def test_ignored_end_is_found(tiny_model: TinyModel, source: SourceModel) -> None:
    assert measured(tiny_model(TASK), source, writer=EndIgnored)["early_ends"] > 0


@pytest.mark.parametrize(
    "settings",
    [{"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}, {"tie_word_embeddings": True}],
    ids=["wrong rope scale", "untied weights"],
)
def test_other_arithmetic_is_found(
    tiny_model: TinyModel, source: SourceModel, tmp_path: Path, settings: dict[str, Any]
) -> None:
    other = load_source_model(build_decoder(tmp_path / "other", **settings), TASK)
    scalars = measured(tiny_model(TASK), source, other=other)
    assert scalars["piece_error"] > 1e-3
    assert scalars["generations"] > 0
