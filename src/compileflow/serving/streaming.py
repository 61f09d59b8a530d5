"""Streams: what `generate` writes, as soon as it is written, as text, server-sent events or token ids."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Event, Lock, Thread
from types import SimpleNamespace
from typing import Any

import numpy as np

from compileflow.errors import InputError, in_words

_END = object()


class _Stream:
    """Pieces that one thread puts and another one iterates over. The prompt comes first, and is left out."""

    def __init__(self) -> None:
        self._in_use = Lock()
        self.clear()
        self.begin()

    def clear(self) -> None:
        """Forget the pieces of an earlier text that are still here."""
        self._pieces: SimpleQueue[Any] = SimpleQueue()

    def begin(self) -> None:
        """Expect the prompt of a text: an earlier one may have ended early."""
        self._is_prompt = True

    @contextmanager
    def one_text(self) -> Iterator[Any]:
        """Keep other generations out, and yield the streamer for `generate`.

        Raises:
            InputError: Another generation writes into this streamer.
        """
        if not self._in_use.acquire(blocking=False):
            raise InputError(
                "The streamer takes the text of another generation, and would mix the two texts.",
                hint="Create a streamer for each generation, or end the other one by closing its iterator.",
            )
        try:
            self.begin()
            yield SimpleNamespace(put=self.put, end=self.end)
        finally:
            self._in_use.release()

    def put(self, value: Any) -> None:
        """Take the prompt, or the next token.

        Raises:
            InputError: The value holds no token ids, or those of several texts.
        """
        ids = _ids_of_one_text(value)
        if self._is_prompt:
            self._is_prompt = False
        else:
            self._take_tokens(ids)

    def _take_tokens(self, ids: Any) -> None:
        for token in ids.tolist():
            self._pieces.put(token)

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
    """Streamer of `generate` and `generate_yield` for one text at a time without its prompt, in whole words.

    Args:
        tokenizer: Tokenizer of the model.
        use_print: Print the pieces.
        use_sse: Iterate over server-sent events instead of texts: each one holds a piece as a JSON string, and the
            last one is `data: [DONE]`.
        skip_special_tokens: Leave out tokens such as the one that ends a text.

    Raises:
        InputError: The tokenizer cannot decode.
    """

    def __init__(
        self, tokenizer: Any, use_print: bool = True, use_sse: bool = False, skip_special_tokens: bool = False
    ):
        if not callable(getattr(tokenizer, "decode", None)):
            raise InputError(
                f"Expected the tokenizer of the model, got {in_words(tokenizer)}.",
                hint="Load it with CompiledTokenizer.from_pretrained.",
            )
        self._tokenizer = tokenizer
        self._use_print = use_print
        self._use_sse = use_sse
        self._skip_special_tokens = skip_special_tokens
        super().__init__()

    def begin(self) -> None:
        """Expect the prompt of a text: an earlier one may have ended early."""
        import transformers

        super().begin()
        self._words: Any = transformers.TextStreamer(
            self._tokenizer, skip_special_tokens=self._skip_special_tokens
        )
        self._print = self._words.on_finalized_text
        self._words.on_finalized_text = self._take

    def end(self) -> None:
        """Take the end of the text."""
        self._is_prompt = True
        self._words.end()

    def _take_tokens(self, ids: Any) -> None:
        self._words.put(ids)

    def _take(self, text: str, stream_end: bool = False) -> None:
        if self._use_print:
            self._print(text, stream_end=stream_end)
        if text:
            self._pieces.put(_event(json.dumps(text)) if self._use_sse else text)
        if stream_end:
            if self._use_sse:
                self._pieces.put(_event("[DONE]"))
            self._pieces.put(_END)


def generate_in_thread(model: Any, ids: Any, stream: Any, settings: Mapping[str, Any]) -> Iterator[Any]:
    """Generate in a thread and yield its pieces; see `GeneratingModel.generate_yield`.

    Args:
        model: The compiled decoder.
        ids: Token ids of one prompt, of shape (1, tokens).
        stream: A `TextStreamer`; None for token ids.
        settings: Further arguments of `generate`.
    """
    import torch

    stream = _Stream() if stream is None else stream
    is_stopped = Event()

    def stop(tokens: Any, scores: Any, **_: Any) -> Any:
        return torch.full((len(tokens),), is_stopped.is_set())

    prompt = torch.from_numpy(ids)
    arguments = {"attention_mask": torch.ones_like(prompt), **settings}
    arguments["stopping_criteria"] = [*arguments.get("stopping_criteria", ()), stop]
    with stream.one_text() as streamer:
        stream.clear()

        def run() -> None:
            try:
                model.generate(prompt, streamer=streamer, **arguments)
            except BaseException as error:  # noqa: BLE001 - the thread that iterates raises it
                stream.fail(error)

        thread = Thread(target=run, name="generate_yield")
        thread.start()
        try:
            yield from stream
        finally:
            is_stopped.set()
            thread.join()


@contextmanager
def streamer_of_one_text(streamer: Any) -> Iterator[Any]:
    """Yield the streamer for a call of `generate`; a `TextStreamer` takes one text at a time.

    Raises:
        InputError: The streamer takes another text, or is not a streamer.
    """
    if isinstance(streamer, _Stream):
        with streamer.one_text() as taker:
            yield taker
        return
    if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        raise InputError(
            f"Expected a streamer, got {in_words(streamer)}.",
            hint="Pass a compileflow.TextStreamer, or leave it out.",
        )
    yield streamer


def check_iterable(streamer: Any) -> None:
    """Check that `generate_yield` can yield the pieces of a streamer.

    Raises:
        InputError: It is neither None nor a `TextStreamer`.
    """
    if not isinstance(streamer, _Stream | None):
        raise InputError(
            f"generate_yield cannot read from {in_words(streamer)}.",
            hint="Pass a compileflow.TextStreamer, or no streamer for token ids.",
        )


def _ids_of_one_text(value: Any) -> Any:
    ids = np.atleast_1d(np.asarray(value))
    if ids.dtype.kind not in "iu" or ids.ndim > 2 or (ids.ndim == 2 and len(ids) != 1):
        found = f"{ids.dtype} of shape {ids.shape}" if ids.dtype.kind in "iufb" else in_words(value)
        raise InputError(
            f"A streamer takes the token ids of one text, got {found}.",
            hint="Generate one text per call, without num_return_sequences.",
        )
    return ids.reshape(-1)


def _event(data: str) -> str:
    return f"data: {data}\n\n"
