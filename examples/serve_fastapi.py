"""Serve a compiled pipeline over HTTP; requests that come at the same time share one call of the model.

ARTIFACT=FOLDER_OR_URI python examples/serve_fastapi.py

One thread calls the model, so that the event loop never waits for it. On SIGTERM nothing new is taken, what was
taken is answered, and the process ends with 0.
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
from typing import Annotated, Any, Literal

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from compileflow import CompiledPipeline
from compileflow.errors import CompileflowError, InputError, LoadError, first_line

logger = logging.getLogger("uvicorn.error")
# The pipelines of these tasks give a list of one item that item's own result.
_UNWRAP_ONE = ("fill-mask", "question-answering")

Text = Annotated[str, Field(max_length=100_000)]
Item = Text | dict[Literal["text", "text_pair", "question", "context"], Text]
# Named one by one, since a pipeline would also take settings that start processes.
Parameter = Literal[
    *("aggregation_strategy", "candidate_labels", "function_to_apply", "handle_impossible_answer"),
    *("hypothesis_template", "max_answer_len", "multi_label", "normalize", "targets", "top_k"),
]


class ServeSettings(BaseSettings):
    """Settings from the environment: ARTIFACT, and SERVE_PORT, SERVE_THREADS and so on."""

    model_config = SettingsConfigDict(env_prefix="SERVE_", env_ignore_empty=True, frozen=True)

    artifact: str = Field(validation_alias="ARTIFACT", description="Folder or URI of a compiled artifact.")
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 is any that is free.")
    threads: int | None = Field(None, ge=1, description="Threads of one call of the model.")
    max_batch: int = Field(16, ge=1, description="Most texts of one call of the model.")
    max_wait_ms: float = Field(2.0, ge=0, description="How long a request waits for others to share its call.")
    queue_limit: int = Field(256, ge=1, description="Most texts that wait; further requests are refused.")
    shutdown_s: int = Field(30, ge=1, description="Seconds after SIGTERM in which accepted requests are answered.")


class Prediction(BaseModel):
    """What POST /predict takes: a text or several, and settings of the pipeline's call."""

    model_config = ConfigDict(extra="forbid")

    inputs: Item | Annotated[list[Item], Field(min_length=1)]
    parameters: dict[Parameter, JsonValue] = {}


class RefusedError(CompileflowError):
    """No request is taken now; the same one may succeed later."""

    retryable = True


@dataclass(frozen=True, eq=False)
class Waiting:
    """An accepted request."""

    items: list[Any]
    single: bool
    parameters: str
    answer: asyncio.Future[Response]
    until_s: float


class Batcher:
    """Collects requests into calls of the model; those of one call have the same parameters."""

    def __init__(self, settings: ServeSettings):
        self.settings = settings
        self.ready = self.draining = False
        self.failure: Exception | None = None
        self.counts = Counter(accepted=0, answered=0, calls=0)
        self._waiting: list[Waiting] = []
        self._changed = asyncio.Event()

    def check_ready(self) -> None:
        """Raise RefusedError unless requests are taken."""
        if self.draining or not self.ready:
            raise RefusedError("The service is stopping." if self.draining else "The model is being loaded.")

    async def submit(self, asked: Prediction) -> Response:
        """Wait for the answer to one request."""
        self.check_ready()
        items = asked.inputs if isinstance(asked.inputs, list) else [asked.inputs]
        limit, held = self.settings.queue_limit, count(self._waiting)
        if len(items) > limit:
            raise InputError(f"The request has {len(items)} texts.", hint=f"Send at most {limit} at once.")
        if held + len(items) > limit:
            raise RefusedError(f"{held} texts are waiting, and at most {limit} may.", hint="Try again later.")
        loop, parameters = asyncio.get_running_loop(), json.dumps(asked.parameters, sort_keys=True)
        until_s = loop.time() + self.settings.max_wait_ms / 1e3
        request = Waiting(items, items is not asked.inputs, parameters, loop.create_future(), until_s)
        self._waiting.append(request)
        self._changed.set()
        self.counts["accepted"] += 1
        try:
            return await request.answer
        finally:
            self.counts["answered"] += 1

    async def run(self) -> None:
        """Load the model, then answer until cancelled; end the process where it cannot be loaded."""
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
        """Take no more requests, and let those that wait for others go at once."""
        self.draining = True
        self._changed.set()

    async def _next_batch(self) -> list[Waiting]:
        while not self._waiting:
            await self._change()
        with suppress(TimeoutError):
            async with asyncio.timeout_at(self._waiting[0].until_s):
                while not self.draining and count(self._fitting()) < self.settings.max_batch:
                    await self._change()
        batch = self._fitting()
        for request in batch:
            self._waiting.remove(request)
        return batch

    def _fitting(self) -> list[Waiting]:
        """Return the oldest request and those with its parameters that fit into one call with it."""
        batch: list[Waiting] = []
        room = self.settings.max_batch
        for each in self._waiting:
            if each.parameters == self._waiting[0].parameters and (not batch or len(each.items) <= room):
                batch.append(each)
                room -= len(each.items)
        return batch

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


def count(requests: Sequence[Waiting]) -> int:
    """Return how many texts some requests have together."""
    return sum(len(request.items) for request in requests)


def load(settings: ServeSettings) -> CompiledPipeline:
    """Load the pipeline, and run its graph in every shape, since first calls are slow."""
    artifact, rows = settings.artifact, settings.max_batch
    pipeline = CompiledPipeline.from_pretrained(artifact, threads=settings.threads, batch_size=rows)
    record = pipeline.model.graph.record
    if record.inputs[0].name != "input_ids":
        raise LoadError(f"{artifact} is for {pipeline.task}, which takes no text.", hint="Serve a text task.")
    buckets = [(each.batch_size, each.sequence_length) for each in record.shape_buckets]
    longest = record.max_sequence_length
    # TorchScript optimises a graph in its second call.
    for shape in 2 * (buckets or [(1, longest), (rows, longest)]):
        pipeline.model.run({"input_ids": [[1] * shape[1]] * shape[0]})
    return pipeline


def answer_together(pipeline: CompiledPipeline, requests: Sequence[Waiting]) -> list[Response | Exception]:
    """Answer requests with one call of the pipeline; where that fails, each alone."""
    items = [item for request in requests for item in request.items]
    try:
        outputs = pipeline(items, **json.loads(requests[0].parameters))
        each = iter([outputs] if len(items) == 1 and pipeline.task in _UNWRAP_ONE else outputs)
        own = [list(islice(each, len(request.items))) for request in requests]
        return [response(o[0] if r.single else o, len(items)) for r, o in zip(requests, own, strict=True)]
    except Exception as error:  # noqa: BLE001 - the sender of the request gets it
        if len(requests) == 1:
            return [error]
        return [answer for request in requests for answer in answer_together(pipeline, [request])]


def response(outputs: Any, together: int) -> Response:
    """Encode outputs; NumPy's arrays and numbers, which some pipelines return, become lists and numbers."""
    body = json.dumps({"outputs": outputs}, default=lambda value: value.tolist())
    return Response(body, media_type="application/json", headers={"X-Batch-Size": str(together)})


def refusal(_: Request, error: Exception) -> JSONResponse:
    """Say in one line what is wrong with a request, and in another what to do."""
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        return JSONResponse({"error": f"{where}: {first['msg']}.", "hint": "/docs has the format."}, 422)
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
        # The server has waited for all answers.
        worker.cancel()
        await asyncio.wait([worker])
        logger.info("stopped: %s", json.dumps(batcher.counts))

    # What transformers' pipelines raise for parameters that they do not like.
    bad = (InputError, KeyError, RefusedError, RequestValidationError, TypeError, ValueError)
    app = FastAPI(title="compileflow", lifespan=lifespan, exception_handlers=dict.fromkeys(bad, refusal))

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
    async def predict(asked: Prediction) -> Response:
        return await batcher.submit(asked)

    return app


class Server(uvicorn.Server):
    """Ends with 0 after a signal, where uvicorn's own would end by that signal."""

    batcher: Batcher

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Refuse what is new; what was accepted is answered before the process ends."""
        self.should_exit = True
        # A signal may interrupt the batcher anywhere; the loop calls this between two of its steps.
        asyncio.get_running_loop().call_soon_threadsafe(self.batcher.drain)


def main() -> str | None:
    """Serve until told to stop; return what went wrong."""
    try:
        settings = ServeSettings()
    except ValidationError as error:
        return "; ".join(f"{each['loc'][0]}: {each['msg']}" for each in error.errors())
    batcher = Batcher(settings)
    where = {"host": settings.host, "port": settings.port}
    app, limit_s = make_app(batcher), settings.shutdown_s
    server = Server(uvicorn.Config(app, **where, timeout_graceful_shutdown=limit_s, access_log=False))
    server.batcher = batcher
    server.run()
    return str(batcher.failure) if batcher.failure else None


if __name__ == "__main__":
    sys.exit(main())
