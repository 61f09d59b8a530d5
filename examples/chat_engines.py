"""How examples/serve_chat.py runs a decoder for several requests at a time: continuous batching, or threads."""

from __future__ import annotations

import asyncio
import queue
import secrets
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import count
from typing import Any, Protocol

from serve_fastapi import RefusedError

from compileflow import CompiledModel
from compileflow.artifact.open import OpenArtifact
from compileflow.contracts.toolkit import environment

_TOKENIZER_FILE = "openvino_tokenizer.xml"
# The manifest's names of the formats that change numbers, and OpenVINO's.
_PROPERTIES = {
    "inference_precision": "INFERENCE_PRECISION_HINT",
    "kv_cache_precision": "KV_CACHE_PRECISION",
    "dynamic_quantization_group_size": "DYNAMIC_QUANTIZATION_GROUP_SIZE",
}
_NO_LIMIT = 2**31
# A temperature at which only the likeliest token is left; below it, logits divided by it overflow.
_GREEDY = 1e-4


@dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are chosen. What is None follows the artifact's generation_config.json."""

    max_tokens: int
    temperature: float | None
    top_p: float | None
    seed: int | None


class Ticket:
    """A request that an engine works on. The engine calls `put` and `end` from other threads.

    Attributes:
        is_cancelled: Whether the engine may drop the request, because its client went away.
    """

    def __init__(self, prompt: list[int], sampling: Sampling, counts: Counter[str]):
        """Count the request.

        Args:
            prompt: Token ids of the prompt.
            sampling: How the tokens of the answer are chosen.
            counts: Counts of a service: requests that run or wait, and tokens that were written.
        """
        self.prompt, self.sampling = prompt, sampling
        self.is_cancelled = False
        self._counts = counts
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[list[int] | Exception | None] = asyncio.Queue()
        counts["requests"] += 1

    def put(self, tokens: list[int]) -> None:
        """Take the next tokens of the answer."""
        self._call(self._take, tokens)

    def end(self, error: Exception | None = None) -> None:
        """Take the end of the answer, after which the engine has forgotten the request."""
        self._call(self._take, error)

    async def next_tokens(self) -> list[int] | None:
        """Return the next tokens, or None at the end of the answer."""
        # An engine that is faster than its reader would keep the event loop from all others.
        await asyncio.sleep(0)
        item = await self._items.get()
        if isinstance(item, Exception):
            raise item
        return item

    def cancel(self) -> None:
        """Let the engine forget the request after its current step."""
        self.is_cancelled = True

    def _call(self, function: Callable[[Any], None], argument: Any) -> None:
        # The event loop is closed if requests are left at the end of the service.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, argument)

    def _take(self, item: list[int] | Exception | None) -> None:
        if isinstance(item, list):
            self._counts["tokens"] += len(item)
        else:
            self._counts["requests"] -= 1
        self._items.put_nowait(item)


class Engine(Protocol):
    """Works on requests, several at a time."""

    takes_seed: bool

    def submit(self, ticket: Ticket) -> None:
        """Begin with a request as soon as there is room."""

    def close(self) -> None:
        """Take no more requests."""


class ContinuousBatching:
    """openvino_genai's pipeline, which one thread calls: each step reads a token of every running request."""

    takes_seed = True

    def __init__(self, artifact: OpenArtifact, *, running: int, threads: int | None, end_ids: set[int]):
        # OpenVINO would send usage data when it is imported.
        with environment(CI="true"):
            import openvino_genai

        record = artifact.component("default")
        options = record.load_options
        properties = {name: options[key] for key, name in _PROPERTIES.items() if key in options}
        if threads is not None:
            properties["INFERENCE_NUM_THREADS"] = threads
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_seqs = running
        folder = artifact.folder / record.folder
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", properties)
        self._end_ids = end_ids
        self._submitted: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="model", daemon=True).start()

    def submit(self, ticket: Ticket) -> None:
        """Begin with a request as soon as there is room."""
        self._submitted.put(ticket)

    def close(self) -> None:
        """End the thread after its current step."""
        self._submitted.put(None)

    def _run(self) -> None:
        running: dict[Ticket, Any] = {}
        numbers = count()
        while True:
            # Without a running request there is nothing to do but wait for one.
            while not running or not self._submitted.empty():
                ticket = self._submitted.get()
                if ticket is None:
                    return
                try:
                    running[ticket] = self._begin(next(numbers), ticket)
                except Exception as error:  # noqa: BLE001 - the sender of the request gets it
                    ticket.end(error)
            for ticket in [ticket for ticket in running if ticket.is_cancelled]:
                running.pop(ticket).cancel()
                ticket.end()
            try:
                self._pipeline.step()
                for ticket, handle in list(running.items()):
                    if self._deliver(ticket, handle):
                        del running[ticket]
            except Exception as error:  # noqa: BLE001 - the senders of the requests get it
                for ticket, handle in running.items():
                    handle.cancel()
                    ticket.end(error)
                running.clear()

    def _begin(self, number: int, ticket: Ticket) -> Any:
        import numpy as np
        import openvino

        sampling, config = ticket.sampling, self._pipeline.get_config()
        config.num_beams, config.max_new_tokens, config.max_length = 1, sampling.max_tokens, _NO_LIMIT
        config.stop_token_ids, config.ignore_eos = self._end_ids, not self._end_ids
        config.rng_seed = secrets.randbits(31) if sampling.seed is None else sampling.seed
        if sampling.temperature is not None:
            config.do_sample = sampling.temperature > _GREEDY
            config.temperature = max(sampling.temperature, _GREEDY)
        if sampling.top_p is not None:
            config.top_p = sampling.top_p
        prompt = openvino.Tensor(np.array([ticket.prompt], np.int64))
        return self._pipeline.add_request(number, prompt, config)

    def _deliver(self, ticket: Ticket, handle: Any) -> bool:
        """Pass on the tokens of the last step, and return whether they were the last ones."""
        while handle.can_read():
            for output in handle.read().values():
                ticket.put(list(output.generated_ids))
        status = handle.get_status().name
        if status == "RUNNING":
            return False
        ticket.end(RefusedError("The cache has no room for this request.") if status == "IGNORED" else None)
        return True


class Threads:
    """`CompiledModel.generate` in a thread for each running request."""

    takes_seed = False

    def __init__(self, artifact: OpenArtifact, *, running: int, threads: int | None):
        self._model: Any = CompiledModel.from_artifact(artifact, threads=threads)
        self._pool = ThreadPoolExecutor(running, thread_name_prefix="model")

    def submit(self, ticket: Ticket) -> None:
        """Begin with a request as soon as there is room."""
        self._pool.submit(self._write, ticket)

    def close(self) -> None:
        """Take no more requests."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _write(self, ticket: Ticket) -> None:
        import torch

        def is_over(ids: Any, scores: Any, **kwargs: Any) -> Any:
            return torch.full((len(ids),), ticket.is_cancelled)

        sampling = ticket.sampling
        choice: dict[str, Any] = {"num_beams": 1, "max_new_tokens": sampling.max_tokens}
        if sampling.temperature is not None:
            choice["do_sample"] = sampling.temperature > _GREEDY
            if sampling.temperature > _GREEDY:
                choice["temperature"] = sampling.temperature
        if sampling.top_p is not None:
            choice["top_p"] = sampling.top_p
        prompt = torch.tensor([ticket.prompt])
        try:
            if not ticket.is_cancelled:
                self._model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    streamer=_Streamer(ticket),
                    stopping_criteria=[is_over],
                    **choice,
                )
        except Exception as error:  # noqa: BLE001 - the sender of the request gets it
            ticket.end(error)
        else:
            ticket.end()


class _Streamer:
    """Passes tokens on to a request; `generate` puts the prompt first."""

    def __init__(self, ticket: Ticket):
        self._ticket = ticket
        self._has_prompt = False

    def put(self, tokens: Any) -> None:
        if self._has_prompt:
            self._ticket.put(tokens.flatten().tolist())
        self._has_prompt = True

    def end(self) -> None:
        """Do nothing: the call of `generate` is about to return."""


def missing_for_batching(artifact: OpenArtifact) -> str:
    """Return what continuous batching lacks; "" if nothing."""
    if artifact.manifest.target.name != "openvino":
        return f"the artifact is for {artifact.manifest.target.name}"
    if find_spec("openvino_genai") is None:
        return "openvino_genai is not installed"
    if not (artifact.folder / artifact.component("default").folder / _TOKENIZER_FILE).is_file():
        return f"the artifact has no {_TOKENIZER_FILE}"
    return ""
