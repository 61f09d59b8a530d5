"""Serve a compiled decoder with OpenAI's interface: chats and completions, as a whole or token by token.

ARTIFACT=FOLDER_OR_URI python examples/serve_chat.py

If the artifact is for openvino and openvino_genai is installed, requests that run at the same time share each
step of the model; otherwise each runs `CompiledModel.generate` in a thread.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import PurePath
from typing import Annotated, Any, Literal

from chat_engines import ContinuousBatching, Engine, Sampling, Threads, Ticket, missing_for_batching
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from serve_fastapi import RefusedError, ServiceSettings, serve
from starlette.exceptions import HTTPException

from compileflow import CompiledTokenizer
from compileflow.artifact.open import open_artifact
from compileflow.errors import (
    CompileflowError,
    InputError,
    LoadError,
    field_problem,
    first_line,
    first_problem,
    in_words,
)
from compileflow.serving.generation import check_prompts, load_generation_config
from compileflow.serving.interface_files import load_part

logger = logging.getLogger("uvicorn.error")
# Bytes that do not yet make up a character are decoded to this one.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class ChatSettings(ServiceSettings):
    """Settings of this service."""

    name: str = Field("", description="Name of the model in requests. Empty: the last part of ARTIFACT.")
    engine: Literal["auto", "continuous-batching", "threads"] = Field(
        "auto", description="How requests share the model. auto: continuous-batching where that is possible."
    )
    max_running: int = Field(8, ge=1, description="Largest number of requests that run at the same time.")
    queue_limit: int = Field(
        64, ge=1, description="Largest number of requests that run or wait; further requests are refused."
    )
    max_prompt_tokens: int | None = Field(None, ge=1, description="Largest number of tokens of a prompt.")
    max_output_tokens: int = Field(1024, ge=1, description="Largest number of tokens of an answer.")
    max_body_bytes: int = Field(1_000_000, ge=1, description="Largest body of a request.")


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a chat."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]

    def plain(self) -> dict[str, str]:
        """Return the message as templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class StreamOptions(BaseModel):
    """Settings of a stream."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False


Stop = Annotated[str, Field(min_length=1)]


class Order(BaseModel):
    """The fields that both kinds of requests have. A field with one value is accepted with that value only.

    The description of a field says what is allowed; errors quote it.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = Field(description="a model that GET /v1/models lists")
    max_tokens: int | None = Field(None, ge=1, description="a whole number of at least 1")
    temperature: float | None = Field(None, ge=0, le=2, description="a number from 0 to 2")
    top_p: float | None = Field(None, gt=0, le=1, description="a number above 0, at most 1")
    seed: int | None = Field(None, ge=0, lt=2**32, description="a whole number from 0 to 4294967295")
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = Field(
        None, description="a text, or a list of at most four texts that are not empty"
    )
    stream: bool = Field(False, description="true or false")
    stream_options: StreamOptions | None = Field(None, description="an object with include_usage, true or false")
    user: str | None = Field(None, description="a text")
    n: Literal[1] | None = Field(None, description="1, because a request gets one answer")
    frequency_penalty: Literal[0] | None = Field(None, description="0, because penalties are not computed")
    presence_penalty: Literal[0] | None = Field(None, description="0, because penalties are not computed")

    @property
    def limit_name(self) -> str:
        """The field that limits the answer."""
        return "max_tokens"

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        return tuple(filter(None, [self.stop] if isinstance(self.stop, str) else self.stop or ()))


class ChatOrder(Order):
    """Body of POST /v1/chat/completions."""

    messages: list[Message] = Field(
        min_length=1,
        description="a list of messages, each with role (system, user or assistant) and content, a text or a list "
        'of {"type": "text", "text": ...}',
    )
    max_completion_tokens: int | None = Field(None, ge=1, description="a whole number of at least 1")
    logprobs: Literal[False] | None = Field(None, description="false, because answers have no probabilities")

    @property
    def limit_name(self) -> str:
        """The field that limits the answer."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @model_validator(mode="after")
    def _one_limit(self) -> ChatOrder:
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        return self


class CompletionOrder(Order):
    """Body of POST /v1/completions: a prompt as text or as token ids."""

    prompt: str | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = Field(
        description="one prompt, a text or a list of token ids"
    )
    echo: Literal[False] | None = Field(None, description="false, because answers do not repeat the prompt")
    best_of: Literal[1] | None = Field(None, description="1, because a request gets one answer")


class ApiError(Exception):
    """An error of a request in OpenAI's form."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """Return the body of the response."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def as_api_error(error: BaseException) -> ApiError:
    """Return any error of a request in OpenAI's form."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        calls = "POST /v1/chat/completions, POST /v1/completions, GET /v1/models, GET /health"
        return ApiError(error.status_code, f"{error.detail}. This service answers {calls}.")
    if isinstance(error, CompileflowError):
        return ApiError(503 if error.retryable else 400, " ".join(filter(None, (error.message, error.hint))))
    logger.error("request failed", exc_info=error)
    return ApiError(500, "The model failed on this request.")


def read_order(kind: type[Any], content: Any) -> Any:
    """Return a request of a kind.

    Raises:
        ApiError: A field is wrong; the message says what it takes.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        path, problem = field_problem(error.errors(), content)
        param = path.partition(".")[0]
        field = kind.model_fields.get(param)
        allowed = f"Allowed: {field.description}." if field else f"Known names: {', '.join(kind.model_fields)}."
        raise ApiError(400, f"{path or 'The body'}: {problem}. {allowed}", param=param or None) from error


class Answer:
    """The text of an answer, in pieces.

    Attributes:
        tokens: Tokens of the answer, with the one that ended it.
        finish_reason: stop after a token or a text that ends an answer, length at the limit; None before the end.
    """

    def __init__(self, ticket: Ticket, tokenizer: CompiledTokenizer, end_ids: set[int], stops: tuple[str, ...]):
        self.ticket = ticket
        self.tokens: list[int] = []
        self.finish_reason: Literal["stop", "length"] | None = None
        self._tokenizer, self._end_ids, self._stops = tokenizer, end_ids, stops
        self._sent = 0
        # The text of the first `_read` tokens, and where the tokens begin that are decoded with the next ones.
        self._text, self._read, self._start = "", 0, 0

    async def pieces(self) -> AsyncIterator[str]:
        """Yield the text as it is written; the pieces make up the text of the whole answer."""
        while self.finish_reason is None:
            tokens = await self.ticket.next_tokens()
            if tokens is None:
                self.finish_reason = "stop" if self.tokens and self.tokens[-1] in self._end_ids else "length"
            self.tokens += tokens or ()
            text = self._grown_text() if tokens else self._decoded(0)
            places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
            if places:
                self.finish_reason = "stop"
                self.ticket.cancel()
                text = text[: min(places)]
            elif self.finish_reason is None:
                text = text[: len(text) - self._uncertain(text)]
            if len(text) > self._sent:
                yield text[self._sent :]
                self._sent = len(text)

    def _grown_text(self) -> str:
        """Return the text of all tokens. Only the last ones are decoded: a long answer would block the others."""
        before, window = self._decoded(self._start, self._read), self._decoded(self._start)
        text = self._text + window[len(before) :]
        if len(window) > len(before) and not window.endswith(_INCOMPLETE):
            self._text, self._start, self._read = text, self._read, len(self.tokens)
        return text

    def _decoded(self, start: int, end: int | None = None) -> str:
        return str(self._tokenizer.decode(self.tokens[start:end], skip_special_tokens=True))

    def _uncertain(self, text: str) -> int:
        """Return how many of the last characters may still change, or may begin a text that ends the answer."""
        longest = max((len(stop) for stop in self._stops), default=0)
        beginnings = [n for n in range(1, min(longest, len(text)) + 1) if _begins(self._stops, text[-n:])]
        return max([len(text) - len(text.rstrip(_INCOMPLETE)), *beginnings])


def _begins(stops: tuple[str, ...], text: str) -> bool:
    return any(stop.startswith(text) for stop in stops)


@dataclass(frozen=True)
class Served:
    """A model that answers.

    Attributes:
        tokenizer: Tokenizer of the model.
        engine: What runs it.
        longest: Tokens that a row can have.
        vocab_size: Number of token ids; 0 if unknown.
        end_ids: Tokens that end an answer.
    """

    tokenizer: CompiledTokenizer
    engine: Engine
    longest: int
    vocab_size: int
    end_ids: set[int]


def load(settings: ChatSettings) -> Served:
    """Open an artifact, which checks its digests and statements, and start an engine with it."""
    artifact = open_artifact(settings.artifact)
    task = artifact.manifest.hf_task
    if not task.generates:
        raise LoadError(
            f"{settings.artifact} is for {task.value}, which writes no text.",
            hint="Serve a model that was compiled for text-generation.",
        )
    record = artifact.component("default")
    ends = load_generation_config(artifact, load_part(artifact, "AutoConfig")).eos_token_id
    end_ids = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
    missing = missing_for_batching(artifact)
    shared = {"running": settings.max_running, "threads": settings.threads}
    if settings.engine == "continuous-batching" and missing:
        raise LoadError(f"Continuous batching is not possible: {missing}.", hint="Set SERVE_ENGINE=threads.")
    if settings.engine == "threads" or missing:
        logger.info("each request runs in a thread: %s", missing or "SERVE_ENGINE=threads")
        engine: Engine = Threads(artifact, **shared)
    else:
        artifact.checked_target(record, "cpu")
        engine = ContinuousBatching(artifact, end_ids=end_ids, **shared)
    tokenizer = CompiledTokenizer.from_artifact(artifact)
    return Served(tokenizer, engine, record.max_sequence_length, record.vocab_size, end_ids)


class ChatService:
    """Turns requests into work for an engine, and its tokens into responses."""

    def __init__(self, settings: ChatSettings):
        self.settings = settings
        self.name = settings.name or PurePath(settings.artifact.partition("@")[0].rpartition(":")[2]).name
        self.draining = False
        self.failure: Exception | None = None
        self.counts = Counter(requests=0, tokens=0)
        self._served: Served | None = None
        self._created = int(time.time())

    async def start(self) -> None:
        """Load the model; end the process if it cannot be loaded."""
        try:
            self._served = await asyncio.get_running_loop().run_in_executor(None, load, self.settings)
        except Exception as error:  # noqa: BLE001 - main() reports it
            self.failure = error
            signal.raise_signal(signal.SIGTERM)
        else:
            logger.info("ready: %s", self.name)

    def drain(self) -> None:
        """Refuse new requests."""
        self.draining = True

    def close(self) -> None:
        """Stop the engine."""
        if self._served is not None:
            self._served.engine.close()

    def check_ready(self) -> Served:
        """Return the loaded model, unless the service does not take requests."""
        if self.draining or self._served is None:
            raise RefusedError("The service is stopping." if self.draining else "The model is being loaded.")
        return self._served

    def models(self) -> dict[str, Any]:
        """Return the body of GET /v1/models."""
        entry = {"id": self.name, "object": "model", "created": self._created, "owned_by": "compileflow"}
        return {"object": "list", "data": [entry]}

    async def read(self, request: Request, kind: type[Any]) -> Any:
        """Read the body of a request."""
        body, limit = b"", self.settings.max_body_bytes
        async for part in request.stream():
            body += part
            if len(body) > limit:
                raise ApiError(413, f"The body has more than {limit} bytes.")
        try:
            content = json.loads(body)
            # A surrogate alone is JSON, but not text.
            json.dumps(content, ensure_ascii=False).encode()
        except RecursionError as error:
            raise ApiError(400, "The body is nested too deeply.") from error
        except UnicodeEncodeError as error:
            raise ApiError(400, "The body holds half of a surrogate pair, which is not text.") from error
        except ValueError as error:
            raise ApiError(400, f"The body is not JSON: {first_line(error)}.") from error
        order = read_order(kind, content)
        self.check_name(order.model)
        return order

    def check_name(self, name: str) -> None:
        """Refuse another name than that of the model."""
        if name != self.name:
            message = f"The model {in_words(name)} does not exist; this service has {self.name!r}."
            raise ApiError(404, message, param="model", code="model_not_found")

    def begin(self, order: ChatOrder | CompletionOrder) -> Answer:
        """Give a request to the engine, after checking it."""
        served = self.check_ready()
        if order.seed is not None and not served.engine.takes_seed:
            raise ApiError(400, "seed needs continuous batching, which this service does not use.", param="seed")
        if isinstance(order, ChatOrder):
            prompt, field = self._chat_prompt(served, order), "messages"
        else:
            given = order.prompt if isinstance(order, CompletionOrder) else ""
            prompt, field = (
                list(served.tokenizer(given)["input_ids"]) if isinstance(given, str) else given,
                "prompt",
            )
        if not prompt:
            raise ApiError(400, "The prompt is empty.", param=field)
        if served.vocab_size and not max(prompt) < served.vocab_size:
            message = f"Expected token ids from 0 to {served.vocab_size - 1}, got {max(prompt)}."
            raise ApiError(400, message, param=field)
        sampling = Sampling(self._room(served, prompt, field, order), order.temperature, order.top_p, order.seed)
        if self.counts["requests"] >= self.settings.queue_limit:
            raise RefusedError(f"The queue is full: {self.counts['requests']} requests run or wait.")
        ticket = Ticket(prompt, sampling, self.counts)
        served.engine.submit(ticket)
        return Answer(ticket, served.tokenizer, served.end_ids, order.stops)

    def _chat_prompt(self, served: Served, order: ChatOrder) -> list[int]:
        messages = [message.plain() for message in order.messages]
        check_prompts(served.tokenizer, messages)
        try:
            encoded = served.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        except Exception as error:
            raise ApiError(400, f"The chat template refuses it: {first_line(error)}.", param="messages") from error
        return list(encoded["input_ids"])

    def _room(self, served: Served, prompt: list[int], field: str, order: Order) -> int:
        """Return how many tokens the answer may have."""
        longest, limit = served.longest, self.settings.max_output_tokens
        most = min(longest - 1, self.settings.max_prompt_tokens or longest)
        code = "context_length_exceeded"
        if len(prompt) > most:
            message = f"The prompt has {len(prompt)} tokens, and at most {most} are allowed."
            raise ApiError(400, message, param=field, code=code)
        if order.max_tokens is None:
            return min(limit, longest - len(prompt))
        if order.max_tokens > limit:
            message = f"An answer has at most {limit} tokens, but {order.limit_name} is {order.max_tokens}."
            raise ApiError(400, message, param=order.limit_name)
        if len(prompt) + order.max_tokens > longest:
            message = (
                f"{len(prompt)} tokens of the prompt and {order.limit_name} {order.max_tokens} exceed {longest} "
                f"tokens, the longest row of the model."
            )
            raise ApiError(400, message, param=order.limit_name, code=code)
        return order.max_tokens

    async def answer(self, request: Request, order: ChatOrder | CompletionOrder) -> Response:
        """Answer a request as a whole or as a stream; the engine forgets it when the client goes away."""
        answer = self.begin(order)
        form = Form(self.name, order)
        if order.stream:
            return EventStream(answer, form)
        reading = asyncio.ensure_future(whole(answer))
        leaving = asyncio.ensure_future(request.receive())
        try:
            # The body was read, so that the next message is that of a client that goes away.
            await asyncio.wait([reading, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                return Response(status_code=499)
            return JSONResponse(form.whole(await reading, answer))
        finally:
            answer.ticket.cancel()
            reading.cancel()
            leaving.cancel()


async def whole(answer: Answer) -> str:
    """Return the whole text of an answer."""
    return "".join([piece async for piece in answer.pieces()])


class Form:
    """The form of the responses to one request."""

    def __init__(self, name: str, order: Order):
        self.is_chat = isinstance(order, ChatOrder)
        self.has_usage = order.stream_options is not None and order.stream_options.include_usage
        kind = "chat.completion" if self.is_chat else "text_completion"
        if order.stream and self.is_chat:
            kind += ".chunk"
        number = ("chatcmpl-" if self.is_chat else "cmpl-") + secrets.token_hex(12)
        self._common = {"id": number, "object": kind, "created": int(time.time()), "model": name}

    def whole(self, text: str, answer: Answer) -> dict[str, Any]:
        """Return the body of a response that is not a stream."""
        content = {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": answer.finish_reason}
        return self._common | {"choices": [choice], "usage": usage(answer)}

    def piece(self, text: str | None, finish_reason: str | None = None, *, first: bool = False) -> dict[str, Any]:
        """Return one event of a stream."""
        delta = {} if text is None else {"content": text}
        content = (
            {"delta": ({"role": "assistant"} if first else {}) | delta} if self.is_chat else {"text": text or ""}
        )
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}
        return self._common | {"choices": [choice]} | ({"usage": None} if self.has_usage else {})

    def last(self, answer: Answer) -> dict[str, Any]:
        """Return the event with the usage."""
        return self._common | {"choices": [], "usage": usage(answer)}


def usage(answer: Answer) -> dict[str, int]:
    """Count the tokens of a prompt and of its answer."""
    counts = {"prompt_tokens": len(answer.ticket.prompt), "completion_tokens": len(answer.tokens)}
    return counts | {"total_tokens": sum(counts.values())}


class EventStream(StreamingResponse):
    """An answer as server-sent events. It ends, and the engine forgets the request, when the client goes away."""

    def __init__(self, answer: Answer, form: Form):
        super().__init__(self._events(answer, form), media_type="text/event-stream")
        self._ticket = answer.ticket

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ticket.cancel()

    async def _events(self, answer: Answer, form: Form) -> AsyncIterator[str]:
        try:
            if form.is_chat:
                yield event(form.piece("", first=True))
            async for piece in answer.pieces():
                yield event(form.piece(piece))
            yield event(form.piece(None, answer.finish_reason))
            if form.has_usage:
                yield event(form.last(answer))
        except Exception as error:  # noqa: BLE001 - the response has already begun, so the client gets an event
            yield event(as_api_error(error).body())
            return
        yield "data: [DONE]\n\n"


def event(content: Mapping[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(content)}\n\n"


def refusal(_: Request, error: Exception) -> JSONResponse:
    """Return an error in OpenAI's form."""
    api_error = as_api_error(error)
    headers = {"Retry-After": "1"} if api_error.status == 503 else {}
    return JSONResponse(api_error.body(), api_error.status, headers)


def make_app(service: ChatService) -> FastAPI:
    """Return the application; its lifespan is the service's."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(service.start())
        yield
        loading.cancel()
        service.close()

    errors = (ApiError, InputError, RefusedError, HTTPException, Exception)
    app = FastAPI(title="compileflow", lifespan=lifespan, exception_handlers=dict.fromkeys(errors, refusal))

    @app.get("/health")
    async def health() -> dict[str, int]:
        service.check_ready()
        return dict(service.counts)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return service.models()

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_name(name)
        entry: dict[str, Any] = service.models()["data"][0]
        return entry

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await service.answer(request, await service.read(request, ChatOrder))

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        return await service.answer(request, await service.read(request, CompletionOrder))

    return app


def main() -> str | None:
    """Serve the artifact that the environment names; return the error that ended the service, if any."""
    try:
        settings = ChatSettings()
    except ValidationError as error:
        return f"{first_problem(error)}."
    service = ChatService(settings)
    return serve(make_app(service), service, settings)


if __name__ == "__main__":
    sys.exit(main())
