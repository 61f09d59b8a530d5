"""Streams: what `generate` writes, as soon as it is written, as text, server-sent events or token ids."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import numpy as np

from compileflow.errors import InputError

_END = object()


class _Stream:
    """Pieces that one thread puts and another one iterates over. The prompt comes first, and is left out."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forget an earlier text, which may have ended early."""
        self._pieces: SimpleQueue[Any] = SimpleQueue()
        self._is_prompt = True

    def put(self, value: Any) -> None:
        """Take the prompt, or the next token."""
        if self._is_prompt:
            self._is_prompt = False
        else:
            self._pieces.put(int(value))

    def end(self) -> None:
        """Take the end of the text."""
        self._is_prompt = True
        self._pieces.put(_END)

    def fail(self, error: BaseException) -> None:
        """Raise an error in the thread that iterates."""
        self._pieces.put(error)

    def __iter__(self) -> Iterator[Any]:
        while (piece := self._pieces.get()) is not _END:
            if isinstance(piece, BaseException):
                raise piece
            yield piece


class TextStreamer(_Stream):
    """Streamer of `generate` and `generate_yield` for one text without its prompt, in whole words.

    Args:
        tokenizer: Tokenizer of the model.
        use_print: Print the pieces.
        use_sse: Iterate over server-sent events instead of texts: each one holds a piece as a JSON string, and the
            last one is `data: [DONE]`.
        skip_special_tokens: Leave out tokens such as the one that ends a text.
    """

    def __init__(
        self, tokenizer: Any, use_print: bool = True, use_sse: bool = False, skip_special_tokens: bool = False
    ):
        self._tokenizer = tokenizer
        self._use_print = use_print
        self._use_sse = use_sse
        self._skip_special_tokens = skip_special_tokens
        super().__init__()

    def begin(self) -> None:
        """Forget an earlier text, which may have ended early."""
        import transformers

        super().begin()
        self._words: Any = transformers.TextStreamer(
            self._tokenizer, skip_prompt=True, skip_special_tokens=self._skip_special_tokens
        )
        self._print = self._words.on_finalized_text
        self._words.on_finalized_text = self._take

    def put(self, value: Any) -> None:
        """Take the prompt, or the next token."""
        self._words.put(value)

    def end(self) -> None:
        """Take the end of the text."""
        self._words.end()

    def _take(self, text: str, stream_end: bool = False) -> None:
        if self._use_print:
            self._print(text, stream_end=stream_end)
        if text:
            self._pieces.put(_event(json.dumps(text)) if self._use_sse else text)
        if stream_end:
            if self._use_sse:
                self._pieces.put(_event("[DONE]"))
            self._pieces.put(_END)


def generate_in_thread(model: Any, input_ids: Any, streamer: Any, settings: Mapping[str, Any]) -> Iterator[Any]:
    """Generate in a thread and yield its pieces; see `GeneratingModel.generate_yield`.

    Raises:
        InputError: There are several prompts, or the streamer is not a TextStreamer.
    """
    import torch

    stream = _Stream() if streamer is None else streamer
    if not isinstance(stream, _Stream):
        raise InputError(
            f"generate_yield cannot read from a {type(stream).__name__}.",
            hint="Pass a compileflow.TextStreamer, or no streamer for token ids.",
        )
    ids = torch.as_tensor(np.atleast_2d(np.asarray(input_ids)))
    if len(ids) != 1:
        raise InputError(f"generate_yield takes one prompt, got {len(ids)}.", hint="Call it once for each prompt.")
    stream.begin()
    is_stopped = Event()

    def stop(tokens: Any, scores: Any, **_: Any) -> Any:
        return torch.full((len(tokens),), is_stopped.is_set())

    arguments = {"attention_mask": torch.ones_like(ids), **settings}
    arguments["stopping_criteria"] = [*arguments.get("stopping_criteria", ()), stop]

    def run() -> None:
        try:
            model.generate(ids, streamer=stream, **arguments)
        except BaseException as error:  # noqa: BLE001 - the thread that iterates raises it
            stream.fail(error)

    thread = Thread(target=run, name="generate_yield")
    thread.start()
    try:
        yield from stream
    finally:
        is_stopped.set()
        thread.join()


def _event(data: str) -> str:
    return f"data: {data}\n\n"
