"""Serve a compiled pipeline over HTTP; requests that come at the same time share one call of the model.

ARTIFACT=FOLDER_OR_URI python examples/serve_fastapi.py
ARTIFACT=FOLDER_OR_URI uvicorn --app-dir examples --factory serve_fastapi:create_app --workers 2

One thread calls the model, so that the event loop never waits for it. After SIGTERM, the service refuses new
requests, answers the accepted ones, and exits with 0.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any, Literal, Protocol

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from compileflow import LightPipeline
from compileflow.errors import (
    CompileflowError,
    InputError,
    SpecError,
    field_problem,
    first_line,
    first_problem,
)

logger = logging.getLogger("uvicorn.error")
# The pipelines of these tasks return the result of a single item without a list.
_UNWRAP_ONE = ("fill-mask", "question-answering")

Text = Annotated[str, Field(max_length=100_000)]
Item = Text | dict[Literal["text", "text_pair", "question", "context"], Text]
# The allowed parameters. A pipeline also takes others, some of which start processes.
Parameter = Literal[
    *("aggregation_strategy", "candidate_labels", "function_to_apply", "handle_impossible_answer"),
    *("hypothesis_template", "max_answer_len", "multi_label", "normalize", "targets", "top_k"),
]


class ServiceSettings(BaseSettings):
    """Settings of any service from the environment: ARTIFACT, and SERVE_PORT, SERVE_THREADS and so on."""

    model_config = SettingsConfigDict(env_prefix="SERVE_", env_ignore_empty=True, frozen=True)

    artifact: str = Field(validation_alias="ARTIFACT", description="Folder or URI of a compiled artifact.")
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 for any free port.")
    threads: int | None = Field(None, ge=1, description="Threads of one call of the model.")
    shutdown_s: int = Field(30, ge=1, description="Seconds after SIGTERM in which accepted requests are answered.")


class ServeSettings(ServiceSettings):
    """Settings of this service."""

    max_tokens: int = Field(
        1024, ge=1, description="Tokens that are enough for one call, counted as four characters each."
    )
    max_batch: int = Field(256, ge=1, description="Largest number of texts in one call of the model.")
    max_wait_ms: float = Field(2.0, ge=0, description="How long a request waits for others to share its call.")
    queue_limit: int = Field(
        256, ge=1, description="Largest number of waiting texts; further requests are refused."
    )
    max_body_bytes: int = Field(10_000_000, ge=1, description="Largest body of a request.")


class Prediction(BaseModel):
    """Body of POST /predict: one text or several, and parameters of the pipeline."""

    model_config = ConfigDict(extra="forbid")

    inputs: Item | Annotated[list[Item], Field(min_length=1)]
    parameters: dict[Parameter, JsonValue] = {}


class RefusedError(CompileflowError):
    """The service cannot take the request now; the same request may succeed later."""

    retryable = True


class TooLargeError(HTTPException):
    """The body of a request is too large."""

    def __init__(self, limit: int):
        super().__init__(413, f"The body has more than {limit} bytes.")


class BodyLimit:
    """Stops reading a body that is too large, so that it does not fill the memory."""

    def __init__(self, app: ASGIApp, limit: int):
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; counts the bytes of its body."""
        size = 0

        async def receive_part() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.limit:
                raise TooLargeError(self.limit)
            return message

        await self.app(scope, receive_part, send)


@dataclass(frozen=True, eq=False)
class WaitingRequest:
    """An accepted request."""

    items: list[Any]
    single: bool
    parameters: str
    tokens: int
    answer: asyncio.Future[Response]
    until_s: float


class Batcher:
    """Collects requests into calls of the model; the requests of a call have the same parameters."""

    def __init__(self, settings: ServeSettings):
        self.settings = settings
        self.ready = self.draining = False
        self.failure: Exception | None = None
        self.counts = Counter(accepted=0, answered=0, calls=0)
        self._waiting: list[WaitingRequest] = []
        self._changed = asyncio.Event()

    def check_ready(self) -> None:
        """Raise RefusedError unless the service takes requests."""
        if self.draining or not self.ready:
            raise RefusedError("The service is stopping." if self.draining else "The model is being loaded.")

    async def submit(self, prediction: Prediction) -> Response:
        """Return the answer to one request."""
        self.check_ready()
        single = not isinstance(prediction.inputs, list)
        items = prediction.inputs if isinstance(prediction.inputs, list) else [prediction.inputs]
        limit, waiting = self.settings.queue_limit, count(self._waiting)
        if len(items) > limit:
            raise InputError(f"The request has {len(items)} texts.", hint=f"Send at most {limit} at once.")
        if waiting + len(items) > limit:
            raise RefusedError(
                f"The queue is full: {waiting} of at most {limit} texts are waiting.", hint="Try again later."
            )
        loop, parameters = asyncio.get_running_loop(), json.dumps(prediction.parameters, sort_keys=True)
        until_s = loop.time() + self.settings.max_wait_ms / 1e3
        tokens = sum(token_count(item) for item in items)
        request = WaitingRequest(items, single, parameters, tokens, loop.create_future(), until_s)
        self._waiting.append(request)
        self._changed.set()
        self.counts["accepted"] += 1
        try:
            return await request.answer
        finally:
            self.counts["answered"] += 1

    async def run(self) -> None:
        """Load the model, then answer until cancelled; end the process if the model cannot be loaded."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, thread_name_prefix="model") as thread:
            try:
                pipeline = await loop.run_in_executor(thread, load, self.settings)
            except Exception as error:  # noqa: BLE001 - main() reports it
                self.failure = error
                signal.raise_signal(signal.SIGTERM)
                return
            self.ready = True
            logger.info("ready: %r", pipeline)
            while True:
                batch = await self._next_batch()
                self.counts["calls"] += 1
                answers = await loop.run_in_executor(thread, answer_together, pipeline, batch)
                for request, answer in zip(batch, answers, strict=True):
                    # The request has already been answered if its time limit was over.
                    if request.answer.done():
                        continue
                    if isinstance(answer, Exception):
                        request.answer.set_exception(answer)
                    else:
                        request.answer.set_result(answer)

    def drain(self) -> None:
        """Refuse new requests, and stop waiting for requests that could share a call."""
        self.draining = True
        self._changed.set()

    async def _next_batch(self) -> list[WaitingRequest]:
        while not self._waiting:
            await self._change()
        with suppress(TimeoutError):
            async with asyncio.timeout_at(self._waiting[0].until_s):
                while not self.draining and not self._is_full(self._fitting()):
                    await self._change()
        batch = self._fitting()
        for request in batch:
            self._waiting.remove(request)
        return batch

    def _fitting(self) -> list[WaitingRequest]:
        """Return the oldest request, and the requests with the same parameters that fit into its call."""
        batch: list[WaitingRequest] = []
        texts_left, tokens_left = self.settings.max_batch, self.settings.max_tokens
        for request in self._waiting:
            fits = len(request.items) <= texts_left and request.tokens <= tokens_left
            if request.parameters == self._waiting[0].parameters and (not batch or fits):
                batch.append(request)
                texts_left -= len(request.items)
                tokens_left -= request.tokens
        return batch

    def _is_full(self, batch: Sequence[WaitingRequest]) -> bool:
        """Tell whether a request has to wait for the next call, or nothing more fits into this one."""
        candidates = [request for request in self._waiting if request.parameters == batch[0].parameters]
        return (
            len(candidates) > len(batch)
            or count(batch) >= self.settings.max_batch
            or sum(request.tokens for request in batch) >= self.settings.max_tokens
        )

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


def count(requests: Sequence[WaitingRequest]) -> int:
    """Return the number of texts of some requests."""
    return sum(len(request.items) for request in requests)


def token_count(item: Any) -> int:
    """Return about how many tokens an item has. The pipeline counts them exactly and divides its calls by them."""
    texts = item.values() if isinstance(item, dict) else [item]
    # A tokenizer adds two tokens, and the model reads at most some hundred.
    return min(512, 2 + sum(map(len, texts)) // 4)


def load(settings: ServeSettings) -> LightPipeline:
    """Load the pipeline, and run its graph in every compiled shape, because first calls are slow."""
    pipeline = LightPipeline.from_pretrained(
        settings.artifact, threads=settings.threads, batch_size=settings.max_batch
    )
    graph = pipeline.model.graph
    if pipeline.task == "image-classification":
        # A pipeline takes a text for the path of an image, so callers would open files of this machine.
        raise SpecError(
            "The artifact classifies images, and this service takes texts.",
            hint="Write a service that decodes the images itself.",
        )
    buckets = [(bucket.batch_size, bucket.sequence_length) for bucket in graph.record.shape_buckets]
    # TorchScript optimizes a graph in its second call. A graph for any shape keeps the memory of its largest call.
    for rows, length in 2 * buckets or [(1, min(16, graph.record.max_sequence_length))]:
        graph.run({"input_ids": [[1] * length] * rows})
    return pipeline


def answer_together(pipeline: LightPipeline, requests: Sequence[WaitingRequest]) -> list[Response | Exception]:
    """Answer requests with one call of the pipeline; if that call fails, answer each request alone."""
    items = [item for request in requests for item in request.items]
    try:
        outputs = pipeline(items, **json.loads(requests[0].parameters))
        remaining = iter([outputs] if len(items) == 1 and pipeline.task in _UNWRAP_ONE else outputs)
        answers = [list(islice(remaining, len(request.items))) for request in requests]
        return [
            response(answer[0] if request.single else answer, len(items))
            for request, answer in zip(requests, answers, strict=True)
        ]
    except Exception as error:  # noqa: BLE001 - the sender of the request gets it
        if len(requests) == 1:
            return [error]
        return [answer for request in requests for answer in answer_together(pipeline, [request])]


def response(outputs: Any, batch_size: int) -> Response:
    """Encode outputs as JSON; NumPy arrays and numbers become lists and numbers."""
    body = json.dumps({"outputs": outputs}, default=lambda value: value.tolist())
    return Response(body, media_type="application/json", headers={"X-Batch-Size": str(batch_size)})


def refusal(_: Request, error: Exception) -> JSONResponse:
    """Return the error of a request and a hint, one line each."""
    if isinstance(error, RequestValidationError):
        path, problem = field_problem(error.errors(), error.body)
        return JSONResponse({"error": f"{path or 'The body'}: {problem}.", "hint": "/docs has the format."}, 422)
    if isinstance(error, TooLargeError):
        return JSONResponse({"error": error.detail, "hint": "Send fewer texts at once."}, error.status_code)
    message, hint = f"{type(error).__name__}: {first_line(error)}.", ""
    if isinstance(error, CompileflowError):
        message, hint = error.message, error.hint
    status, headers = (503, {"Retry-After": "1"}) if isinstance(error, RefusedError) else (400, {})
    return JSONResponse({"error": message, "hint": hint}, status, headers)


def make_app(batcher: Batcher) -> FastAPI:
    """Return the application; its lifespan is the batcher's."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker = asyncio.create_task(batcher.run())
        yield
        # The server has already waited for all answers.
        worker.cancel()
        await asyncio.wait([worker])
        logger.info("stopped: %s", json.dumps(batcher.counts))

    refused_errors = (InputError, RefusedError, SpecError, TooLargeError, RequestValidationError)
    app = FastAPI(
        title="compileflow", lifespan=lifespan, exception_handlers=dict.fromkeys(refused_errors, refusal)
    )

    app.add_middleware(BodyLimit, limit=batcher.settings.max_body_bytes)

    @app.get("/live")
    async def live() -> dict[str, bool]:
        return {"live": True}

    @app.get("/ready")
    async def ready() -> dict[str, bool]:
        batcher.check_ready()
        return {"ready": True}

    @app.get("/metrics")
    async def metrics() -> dict[str, int]:
        return dict(batcher.counts)

    @app.post("/predict")
    async def predict(prediction: Prediction) -> Response:
        return await batcher.submit(prediction)

    return app


def create_app() -> FastAPI:
    """Return the application for a server that starts workers: uvicorn, or gunicorn with uvicorn's worker.

    Each worker loads the artifact when it starts, also after gunicorn's `--preload`.
    """
    return make_app(Batcher(ServeSettings()))


class Service(Protocol):
    """What answers requests."""

    failure: Exception | None

    def drain(self) -> None:
        """Refuse new requests; called after a signal."""


class Server(uvicorn.Server):
    """Exits with 0 after a signal; uvicorn's server would end by that signal."""

    service: Service

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Refuse new requests; the process answers the accepted ones before it ends."""
        self.should_exit = True
        # A signal may interrupt the service anywhere; the event loop calls `drain` between two of its steps.
        asyncio.get_running_loop().call_soon_threadsafe(self.service.drain)


def serve(app: FastAPI, service: Service, settings: ServiceSettings) -> str | None:
    """Serve until a signal arrives; return the error that ended the service, if any."""
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        timeout_graceful_shutdown=settings.shutdown_s,
        access_log=False,
    )
    server = Server(config)
    server.service = service
    server.run()
    return str(service.failure) if service.failure else None


def main() -> str | None:
    """Serve the artifact that the environment names; return the error that ended the service, if any."""
    try:
        settings = ServeSettings()
    except ValidationError as error:
        return f"{first_problem(error)}."
    batcher = Batcher(settings)
    return serve(make_app(batcher), batcher, settings)


if __name__ == "__main__":
    sys.exit(main())
