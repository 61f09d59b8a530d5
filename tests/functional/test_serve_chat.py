"""examples/serve_chat.py in its own process, asked by OpenAI's own client."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from threading import Barrier
from typing import Any

import httpx2
import openai
import pytest
import torch
import transformers

from compileflow.spec import ComponentSpec, HfTask
from compileflow.testing.shared import make_once, shared_folder
from tests.in_process import InProcess
from tests.models import build_decoder
from tests.services.example_process import WAIT_S, ExampleProcess
from tests.smollm2 import SmolLM2

TASK = HfTask.TEXT_GENERATION
MAX_TOKENS = 8192
# The first one ends by itself after 144 tokens, and the others write on.
PROMPTS = [
    "i like it",
    "please",
    "where is my order today because it is late",
    "it arrived",
    "the train was late and",
]
ENGINES = ["continuous-batching", pytest.param("threads", marks=pytest.mark.slow)]
Start = Callable[..., AbstractContextManager["ChatProcess"]]


class ChatProcess(ExampleProcess):
    """A running service."""

    engine = "auto"

    @cached_property
    def client(self) -> openai.OpenAI:
        """OpenAI's client, when the model is loaded."""
        http = httpx2.Client(trust_env=False, timeout=WAIT_S)
        self.poll(lambda: http.get(f"{self.url()}/health").status_code == 200)
        return openai.OpenAI(base_url=f"{self.url()}/v1", api_key="none", http_client=http, max_retries=0)

    def post(self, content: bytes | str, path: str = "/v1/chat/completions") -> httpx2.Response:
        """Send a body that OpenAI's client would not."""
        return httpx2.post(f"{self.url()}{path}", content=content, trust_env=False, timeout=WAIT_S)

    def counts(self) -> dict[str, int]:
        """Return how many requests run or wait, and how many tokens were written."""
        return dict(httpx2.get(f"{self.url()}/health", trust_env=False).json())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small decoder whose texts can be long."""
    return make_once(
        shared_folder(tmp_path_factory) / "long-decoder", lambda path: build_decoder(path, max_tokens=MAX_TOKENS)
    )


@pytest.fixture(scope="module")
def artifact(source: Path, in_process: InProcess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That decoder, compiled for openvino."""
    components = [ComponentSpec(max_sequence_length=MAX_TOKENS)]
    return (
        make_once(
            shared_folder(tmp_path_factory) / "long-decoder-openvino",
            lambda path: in_process.compile(
                source, path / "chat", target="openvino", hf_task=TASK, components=components
            ),
        )
        / "chat"
    )


@pytest.fixture(scope="module")
def start(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Start services with settings by name."""

    @contextmanager
    def started(**settings: Any) -> Iterator[ChatProcess]:
        variables = {"ARTIFACT": str(settings.pop("artifact", artifact)), "SERVE_THREADS": "1"}
        variables |= {f"SERVE_{name.upper()}": str(value) for name, value in settings.items()}
        with ChatProcess.started("serve_chat.py", tmp_path_factory.mktemp("chat"), variables) as process:
            yield process
            if "client" in vars(process):
                process.client.close()

    return started


@pytest.fixture(scope="module", params=ENGINES)
def service(request: pytest.FixtureRequest, start: Start) -> Iterator[ChatProcess]:
    """A service that tests share."""
    limits = {"max_output_tokens": 8000, "max_prompt_tokens": 64, "max_body_bytes": 20_000}
    with start(engine=request.param, **limits) as process:
        process.engine = request.param
        yield process


@pytest.fixture(scope="module")
def expected(source: Path) -> Callable[..., str]:
    """Write on from a prompt with transformers itself."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model = transformers.AutoModelForCausalLM.from_pretrained(source).eval()

    def write(prompt: str, tokens: int, *, chat: bool) -> str:
        ids = tokenizer(prompt)["input_ids"]
        if chat:
            ids = tokenizer.apply_chat_template(as_chat(prompt), add_generation_prompt=True)["input_ids"]
        output = model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False)
        return str(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))

    return write


def as_chat(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def written(stream: Any) -> tuple[str, Any, Any]:
    """Read a stream of a chat: the text, why it ended, and the usage."""
    chunks = list(stream)
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert choices[0].delta.role == "assistant"
    assert [choice.finish_reason for choice in choices[:-1]] == [None] * (len(choices) - 1)
    text = "".join(choice.delta.content or "" for choice in choices)
    return text, choices[-1].finish_reason, chunks[-1].usage


def test_chat_is_answered_as_transformers_does(service: ChatProcess, expected: Any) -> None:
    client = service.client
    request: Any = {"model": "chat", "messages": as_chat(PROMPTS[1]), "max_completion_tokens": 40}
    answer = client.chat.completions.create(**request)
    text = expected(PROMPTS[1], 40, chat=True)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (text, "length")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (6, 40, 46)
    stream = client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True})
    assert written(stream) == (text, "length", answer.usage)
    assert written(client.chat.completions.create(**request, stream=True))[:2] == (text, "length")


def test_text_is_completed_until_it_ends(service: ChatProcess, expected: Any) -> None:
    client = service.client
    request: Any = {"model": "chat", "prompt": PROMPTS[0], "max_tokens": 300, "temperature": 0}
    answer = client.completions.create(**request)
    text = expected(PROMPTS[0], 300, chat=False)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (text, "stop")
    assert answer.usage.completion_tokens < 300
    chunks = list(client.completions.create(**request, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == text
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_stop_text_ends_an_answer_before_it(service: ChatProcess, expected: Any) -> None:
    text = expected(PROMPTS[2], 60, chat=True)
    stop = text[50:58]
    request: Any = {"model": "chat", "messages": as_chat(PROMPTS[2]), "max_tokens": 2000, "stop": ["\n", stop]}
    answer = service.client.chat.completions.create(**request)
    before = text[: text.index(stop)]
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (before, "stop")
    assert answer.usage.completion_tokens < 60
    stream = service.client.chat.completions.create(**request, stream=True)
    assert written(stream)[:2] == (before, "stop")
    service.poll(lambda: service.counts()["requests"] == 0)


def test_eight_at_once_get_the_answers_that_each_gets_alone(service: ChatProcess, expected: Any) -> None:
    prompts = [f"{prompt} {word}" for prompt in PROMPTS[1:] for word in ("today", "it")]
    client, barrier = service.client, Barrier(len(prompts))

    def ask(prompt: str) -> str:
        barrier.wait(WAIT_S)
        request: Any = {"model": "chat", "messages": as_chat(prompt), "max_tokens": 64, "temperature": 0}
        if prompt.endswith("it"):
            return written(client.chat.completions.create(**request, stream=True))[0]
        return str(client.chat.completions.create(**request).choices[0].message.content)

    with ThreadPoolExecutor(len(prompts)) as threads:
        answers = list(threads.map(ask, prompts))
    assert answers == [expected(prompt, 64, chat=True) for prompt in prompts]


def test_samples_follow_their_seed(service: ChatProcess) -> None:
    client = service.client

    def sample(**settings: Any) -> str:
        answer = client.completions.create(
            model="chat", prompt="it arrived", max_tokens=24, temperature=1.5, **settings
        )
        return str(answer.choices[0].text)

    assert sample() != sample()
    if service.engine == "threads":
        with pytest.raises(openai.BadRequestError, match="seed needs continuous batching"):
            sample(seed=1)
    else:
        assert sample(seed=1) == sample(seed=1) != sample(seed=2)


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_leaves_frees_its_place(service: ChatProcess, stream: bool) -> None:
    client = service.client
    # To others the model writes for a second, to this one for several.
    request: Any = {"model": "chat", "messages": as_chat(PROMPTS[0]), "max_tokens": 8000}
    earlier_tokens = service.counts()["tokens"]
    if stream:
        answer = client.chat.completions.create(**request, stream=True)
        assert [next(answer).choices[0].finish_reason for _ in range(3)] == [None] * 3
        assert service.counts()["requests"] == 1
        answer.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.3).chat.completions.create(**request)
    service.poll(lambda: service.counts()["requests"] == 0)
    assert service.counts()["tokens"] - earlier_tokens < 8000


def test_full_queue_refuses_until_a_request_ends(start: Start) -> None:
    with start(max_running=1, queue_limit=2, max_output_tokens=8000) as service:
        client = service.client
        # Its answer is long as well.
        request: Any = {"model": "chat", "prompt": "where", "max_tokens": 8000, "stream": True}
        running, waiting = client.completions.create(**request), client.completions.create(**request)
        next(running)
        with pytest.raises(openai.InternalServerError, match="The queue is full: 2 requests run or wait") as error:
            client.completions.create(**request)
        assert (error.value.status_code, error.value.response.headers["retry-after"]) == (503, "1")
        running.close()
        assert next(waiting).choices[0].text
        waiting.close()
        patient = client.with_options(max_retries=8)
        assert patient.completions.create(**(request | {"max_tokens": 2, "stream": False})).choices[0].text


CHAT_NAMES = "Known names: model, max_tokens, temperature"
CONTENT = 'content, a text or a list of {"type": "text", "text": ...}.'
# A change of a good request, status, field and message. The message names the field once.
WRONG: list[tuple[dict[str, Any], int, str, str]] = [
    ({"model": "other"}, 404, "model", "The model 'other' does not exist; this service has 'chat'."),
    ({"n": 2}, 400, "n", "n: expected 1, got 2. Allowed: 1, because a request gets one answer."),
    ({"logprobs": True}, 400, "logprobs", "logprobs: expected false, got true. Allowed: false, because"),
    ({"tools": []}, 400, "tools", f"tools: this name is not known. {CHAT_NAMES}"),
    ({"frequency_penalty": 0.5}, 400, "frequency_penalty", "frequency_penalty: expected 0, got 0.5."),
    (
        {"temperature": 3},
        400,
        "temperature",
        "temperature: expected at most 2, got 3. Allowed: a number from 0 to 2.",
    ),
    ({"temperature": "hot"}, 400, "temperature", 'temperature: expected a number, got "hot".'),
    ({"top_p": 0}, 400, "top_p", "top_p: expected more than 0, got 0."),
    ({"stop": 5}, 400, "stop", "stop: expected text or a list, got 5. Allowed: a text, or a list of at most four"),
    ({"stop": ["a", 5]}, 400, "stop", "stop.1: expected text, got 5."),
    ({"stop": list("abcde")}, 400, "stop", 'stop: expected at most 4 items, got ["a", "b", "c", "d", "e"].'),
    ({"stream_options": {"usage": 1}}, 400, "stream_options", "stream_options.usage: this name is not known."),
    ({"max_tokens": "4"}, 400, "max_tokens", 'max_tokens: expected a whole number, got "4".'),
    ({"max_tokens": True}, 400, "max_tokens", "max_tokens: expected a whole number, got true."),
    ({"temperature": True}, 400, "temperature", "temperature: expected a number, got true."),
    ({"stream": "yes"}, 400, "stream", 'stream: expected true or false, got "yes".'),
    ({"stop": ""}, 400, "stop", "stop: expected at least 1"),
    ({"max_tokens": 0}, 400, "max_tokens", "max_tokens: expected at least 1, got 0."),
    ({"max_tokens": 8001}, 400, "max_tokens", "An answer has at most 8000 tokens, but max_tokens is 8001."),
    (
        {"max_completion_tokens": 8001},
        400,
        "max_completion_tokens",
        "An answer has at most 8000 tokens, but max_completion_tokens is 8001.",
    ),
    ({"messages": as_chat("it " * 80)}, 400, "messages", "at most 64 are allowed"),
    ({"messages": []}, 400, "messages", "messages: expected at least 1 item, got []."),
    ({"messages": "it"}, 400, "messages", 'messages: expected a list, got "it".'),
    ({"messages": [{"role": "user"}]}, 400, "messages", "messages.0.content: a value is required."),
    (
        {"messages": [{"role": "user", "content": 5}]},
        400,
        "messages",
        "messages.0.content: expected text or a list,",
    ),
    ({"messages": [{"role": "user", "content": []}]}, 400, "messages", CONTENT),
    (
        {"messages": [{"role": "tool", "content": "a"}]},
        400,
        "messages",
        "messages.0.role: expected 'system', 'user' or 'assistant', got \"tool\".",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}]},
        400,
        "messages",
        "messages.0.content.0.type: expected 'text', got \"image_url\".",
    ),
    ({"messages": as_chat("a" * 30_000)}, 413, "", "The body has more than 20000 bytes"),
]


@pytest.mark.parametrize(("change", "status", "param", "message"), WRONG, ids=lambda value: str(value)[:30])
def test_wrong_request_gets_one_line(
    service: ChatProcess, change: dict[str, Any], status: int, param: str, message: str
) -> None:
    with pytest.raises(openai.APIStatusError) as error:
        service.client.post(
            "/chat/completions", cast_to=object, body={"model": "chat", "messages": as_chat("it")} | change
        )
    assert (error.value.status_code, error.value.param or "") == (status, param)
    assert error.value.type == "invalid_request_error"
    text = error.value.body["message"]  # type: ignore[index]
    assert message in text
    assert "\n" not in text


def test_other_wrong_requests(service: ChatProcess) -> None:
    assert service.client
    for body, says in (
        ("{", "The body is not JSON: "),
        ("[]", "The body: expected an object, got []."),
        (b"\xff", "The body is not JSON: "),
        ("", "The body is not JSON: "),
        ("[" * 15_000, "The body is nested too deeply."),
        (r'{"model": "chat", "prompt": "\ud800"}', "The body holds half of a surrogate pair"),
    ):
        response = service.post(body)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["type"] == "invalid_request_error"
        assert response.json()["error"]["message"].startswith(says)
    for content, param, says in (
        ({"prompt": [9999]}, "prompt", "Expected token ids from 0 to 599, got 9999."),
        ({"prompt": ""}, "prompt", "The prompt is empty."),
        (
            {"prompt": None},
            "prompt",
            "prompt: expected text or a list, got null. Allowed: one prompt, a text or a",
        ),
        ({"prompt": ["a"]}, "prompt", 'prompt.0: expected a whole number, got "a".'),
        ({"prompt": "a", "echo": True}, "echo", "echo: expected false, got true."),
        ({}, "prompt", "prompt: a value is required."),
    ):
        response = service.post(json.dumps({"model": "chat"} | content), "/v1/completions")
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, param)
        assert error["message"].startswith(says)
    assert "POST /v1/completions" in service.post("{}", "/v1/images").json()["error"]["message"]


def test_models_are_listed(service: ChatProcess) -> None:
    assert [model.id for model in service.client.models.list()] == ["chat"]
    assert service.client.models.retrieve("chat").id == "chat"
    with pytest.raises(openai.NotFoundError, match="The model 'owner/other' does not exist"):
        service.client.models.retrieve("owner/other")


@pytest.mark.slow
def test_chat_with_a_model_without_a_template_is_refused(
    start: Start, in_process: InProcess, tmp_path: Path
) -> None:
    source = build_decoder(tmp_path / "source", template=None)
    folder = in_process.compile(source, tmp_path / "plain", target="openvino", hf_task=TASK)
    with start(artifact=folder) as service:
        client = service.client
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            client.chat.completions.create(model="plain", messages=as_chat("it"))
        assert client.completions.create(model="plain", prompt="it", max_tokens=4).choices[0].text


def test_altered_artifact_ends_the_service_with_one_line(start: Start, artifact: Path, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(artifact, tmp_path / "chat")
    with (folder / "components" / "default" / "openvino_detokenizer.xml").open("a") as file:
        file.write("\n")
    with start(artifact=folder) as service:
        assert service.process.wait(WAIT_S) == 1
        log = service.log.read_text("utf-8")
    assert "openvino_detokenizer.xml was altered" in log.splitlines()[-1]
    assert "Traceback" not in log


@pytest.mark.slow
def test_smollm2_answers_eight_at_once_as_it_answers_each_alone(start: Start, smollm2: SmolLM2) -> None:
    countries = ["France", "Italy", "Spain", "Japan", "Egypt", "Peru", "Kenya", "India"]
    with start(artifact=smollm2.compiled("openvino")) as service:

        def ask(country: str) -> str:
            messages = as_chat(f"What is the capital of {country}?")
            chunks = service.client.chat.completions.create(model="artifact", messages=messages, stream=True)
            return written(chunks)[0]

        with ThreadPoolExecutor(len(countries)) as threads:
            together = list(threads.map(ask, countries))
        assert together == [ask(country) for country in countries]
    assert "Paris" in together[0]
