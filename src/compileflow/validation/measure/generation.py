"""Generation: both models write on from the same prompts, and the first token on which they part is judged.

Texts are compared by token ids, never by text that was tokenized again. Two models that find two tokens equally
likely may part without a fault (a near tie). From there on their texts say nothing about each other.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from compileflow.errors import InputError, first_line
from compileflow.validation.measure import metrics
from compileflow.validation.measure.measurements import Measurements, Model

logger = logging.getLogger(__name__)
# Two tokens are a near tie if each model ranks the other's token second, within this distance in nats.
NEAR_TIE = 0.125
_BATCH = 8
_ALONE, _BEAMS, _BEAM_TOKENS = 4, 2, 16
# Token after which a generation ends early, and lengths of odd prompts.
_ENDS_AFTER, _ODD_LENGTHS = 3, (1, 2, 3, 5, 7)
# Scores of two beams that are closer are equal; they are mean log probabilities of a token.
_BEAM_TIE = 1e-3
_NAMED = 3

Parting = Literal["none", "near tie", "real"]
_REAL: Parting = "real"


@dataclass(frozen=True)
class Settings:
    """Settings of one generation, which chooses the likeliest tokens.

    Attributes:
        new_tokens: Tokens to write at most.
        beams: Number of beams; 1 takes the likeliest token each time.
        end_id: Token that ends a text; None: each text gets all its tokens.
    """

    new_tokens: int
    beams: int = 1
    end_id: int | None = None


@dataclass(frozen=True)
class Written:
    """What a model wrote after some prompts.

    Attributes:
        ids: New tokens of each row, of shape (rows, tokens); padding follows the token that ends a text.
        ranked: The two likeliest tokens at each place, of shape (rows, tokens, 2); None for beams.
        gaps: How much likelier the first of them is, in nats, of shape (rows, tokens); None for beams.
        scores: Mean log probability of a token of each row; None without beams.
    """

    ids: NDArray[np.int64]
    ranked: NDArray[np.int64] | None = None
    gaps: NDArray[Any] | None = None
    scores: NDArray[Any] | None = None

    def row(self, number: int) -> Written:
        """Return one row alone."""
        rest = (self.ranked, self.gaps, self.scores)
        kept = (None if values is None else values[number : number + 1] for values in rest)
        return Written(self.ids[number : number + 1], *kept)


class Writer(Protocol):
    """A model that writes on from prompts with transformers' `generate`."""

    def write(self, prompts: Mapping[str, NDArray[Any]], settings: Settings) -> Written:
        """Write on from prompts, given as input_ids and attention_mask that are padded on the left."""


class Reader(Protocol):
    """A model that reads rows piece by piece, and gives the logits of each token."""

    def read(self, pieces: Sequence[Mapping[str, NDArray[Any]]]) -> NDArray[Any]:
        """Read pieces of the same rows, one after another, and return the logits of all tokens.

        Args:
            pieces: Tokens of each piece as input_ids, and the attention_mask of all tokens so far.
        """


@dataclass(frozen=True)
class Prompts:
    """Natural prompts of one model.

    Attributes:
        rows: Token ids of each prompt.
        texts: Text of each prompt.
        pad_token_id: Token that pads them.
        longest: Longest row that the compiled model takes.
        new_tokens: Tokens that are written after each prompt.
    """

    rows: Sequence[Sequence[int]]
    texts: Sequence[str]
    pad_token_id: int
    longest: int
    new_tokens: int

    def batch(self, rows: Sequence[Sequence[int]]) -> dict[str, NDArray[np.int64]]:
        """Pad rows on the left."""
        length = max(map(len, rows))
        ids = np.full((len(rows), length), self.pad_token_id, np.int64)
        mask = np.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, length - len(row) :] = row
            mask[number, length - len(row) :] = 1
        return {"input_ids": ids, "attention_mask": mask}


def measure_generation(
    measurements: Measurements,
    reference: Writer,
    candidate: Writer,
    prompts: Prompts,
    *,
    progress: Callable[[str], None],
) -> None:
    """Compare what both models write, and what the compiled model writes in other circumstances.

    The scalars count rows that differ really: `generations` after natural prompts, `batch_rows` beside other rows
    and alone, `later_requests` asked again, `prompt_lengths` after odd prompts, `early_ends` with a token that
    ends the text, `beams` with a beam search, and `long_prompts` that are not refused.

    Args:
        measurements: Gets a scalar for each comparison, and the rate `greedy` over the prompts.
        reference: The source model.
        candidate: The compiled model.
        prompts: Natural prompts.
        progress: Is told what is compared.
    """
    greedy = Settings(prompts.new_tokens)
    counts = _Counts(measurements)
    batches: list[tuple[Sequence[Sequence[int]], Written]] = []
    for start in range(0, len(prompts.rows), _BATCH):
        progress(f"generating from prompts {start + 1} to {min(start + _BATCH, len(prompts.rows))}")
        rows, texts = prompts.rows[start : start + _BATCH], prompts.texts[start : start + _BATCH]
        before = reference.write(prompts.batch(rows), greedy)
        after = _attempt(candidate, prompts.batch(rows), greedy)
        partings = _compared(after, before)
        counts.add("generations", texts, partings)
        measurements.rates += [
            {"metric": "greedy", "text": text, "hits": int(parting != "real"), "trials": 1}
            for text, parting in zip(texts, partings, strict=True)
        ]
        if after is not None:
            batches.append((rows, after))
    progress("generating alone, again, from odd prompts, with an early end and with beams")
    _measure_repetitions(counts, candidate, prompts, *(batches[0] if batches else ((), None)))
    _measure_lengths(counts, reference, candidate, prompts)
    _measure_early_ends(counts, reference, candidate, prompts)
    _measure_beams(counts, reference, candidate, prompts)
    counts.add("long_prompts", ["a prompt of the longest row"], [_too_long(candidate, prompts)])
    counts.finish()


def measure_pieces(measurements: Measurements, reference: Model, candidate: Reader, prompts: Prompts) -> None:
    """Let the compiled model read rows piece by piece, and compare its logits with those of the whole rows.

    The scalar `piece_error` is ||r - c|| / ||r|| of the worst row without padding.

    Args:
        measurements: Gets the scalar.
        reference: The source model, which reads whole rows.
        candidate: The compiled model.
        prompts: Natural prompts.
    """
    rows = sorted(prompts.rows, key=len)
    inputs = prompts.batch([rows[0], rows[len(rows) // 2], rows[-1]])
    expected = reference(inputs)["logits"]
    length = inputs["input_ids"].shape[1]
    # The first piece is a prompt, the next ones are single tokens, and the last one is the rest.
    edges = [0, max(1, length // 2), *range(max(1, length // 2) + 1, length - 1), length]
    pieces = [
        {"input_ids": inputs["input_ids"][:, start:end], "attention_mask": inputs["attention_mask"][:, :end]}
        for start, end in pairwise(edges)
        if end > start
    ]
    try:
        actual = candidate.read(pieces)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - the runtimes' errors have no narrower common base
        measurements.scalars["piece_error"] = math.inf
        measurements.details["piece_error"] = f"{type(error).__name__}: {first_line(error)}"
        return
    mask = inputs["attention_mask"].astype(bool)
    measurements.scalars["piece_error"] = max(
        metrics.rel_l2(before[keep], after[keep])
        for before, after, keep in zip(expected, actual, mask, strict=True)
    )


def part(before: Written, after: Written) -> list[Parting]:
    """Say of each row whether two texts part, and whether a near tie explains it."""
    partings: list[Parting] = []
    for row in range(len(before.ids)):
        length = min(before.ids.shape[1], after.ids.shape[1])
        differs = np.flatnonzero(before.ids[row, :length] != after.ids[row, :length])
        if not differs.size:
            partings.append("none" if before.ids.shape[1] == after.ids.shape[1] else "real")
        else:
            partings.append("near tie" if _is_near_tie(before, after, row, int(differs[0])) else "real")
    return partings


def _is_near_tie(before: Written, after: Written, row: int, place: int) -> bool:
    """Return whether each model ranks the other's token second there, and finds it nearly as likely."""
    if before.ranked is None or after.ranked is None or before.gaps is None or after.gaps is None:
        return False
    are_exchanged = np.array_equal(before.ranked[row, place], after.ranked[row, place, ::-1])
    # Each gap by itself, because NaN must fail.
    return are_exchanged and all(float(gaps[row, place]) <= NEAR_TIE for gaps in (before.gaps, after.gaps))


class _Counts:
    """Counts real differences by what was compared, and names the first ones."""

    def __init__(self, measurements: Measurements):
        self._measurements = measurements
        self._rows: dict[str, list[tuple[str, Parting]]] = {}

    def add(self, name: str, texts: Sequence[str], partings: Sequence[Parting]) -> None:
        self._rows.setdefault(name, []).extend(zip(texts, partings, strict=True))

    def finish(self) -> None:
        for name, rows in self._rows.items():
            real = [text for text, parting in rows if parting == "real"]
            ties = sum(parting == "near tie" for _, parting in rows)
            self._measurements.scalars[name] = float(len(real))
            words = f"{len(real)} of {len(rows)} differ"
            if ties:
                words += f", {ties} more after a near tie"
            if real:
                words += ": " + "; ".join(repr(text[:60]) for text in real[:_NAMED])
            self._measurements.details[name] = words


def _attempt(candidate: Writer, inputs: Mapping[str, NDArray[Any]], settings: Settings) -> Written | None:
    """Let the compiled model write; None if it fails, which counts as another answer."""
    try:
        return candidate.write(inputs, settings)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - the runtimes' errors have no narrower common base
        logger.warning("the compiled model does not generate: %s", error)
        return None


def _compared(written: Written | None, expected: Written) -> list[Parting]:
    """Compare what a model wrote; nothing differs in each row."""
    return [_REAL] * len(expected.ids) if written is None else part(expected, written)


def _measure_repetitions(
    counts: _Counts,
    candidate: Writer,
    prompts: Prompts,
    rows: Sequence[Sequence[int]],
    written: Written | None,
) -> None:
    """Let the compiled model write after the same prompts again: each alone, and all of a batch.

    Args:
        counts: Counts the differences.
        candidate: The compiled model.
        prompts: Natural prompts.
        rows: Prompts of a batch.
        written: What the model wrote after them; None if it never wrote anything.
    """
    greedy = Settings(prompts.new_tokens)
    if written is None:
        for name in ("batch_rows", "later_requests"):
            counts.add(name, prompts.texts[:1], [_REAL])
        return
    for number, row in enumerate(rows[:_ALONE]):
        alone = _attempt(candidate, prompts.batch([row]), greedy)
        counts.add("batch_rows", prompts.texts[number : number + 1], _compared(alone, written.row(number)))
    again = _attempt(candidate, prompts.batch(rows), greedy)
    counts.add("later_requests", prompts.texts[: len(rows)], _compared(again, written))


def _measure_lengths(counts: _Counts, reference: Writer, candidate: Writer, prompts: Prompts) -> None:
    """Compare prompts of odd lengths, and one that leaves room for a single token."""
    stream = [token for row in prompts.rows for token in row]
    lengths = [length for length in (*_ODD_LENGTHS, prompts.longest - 1) if 1 <= length < prompts.longest]
    for length in dict.fromkeys(lengths):
        row = (stream * (length // max(1, len(stream)) + 1))[:length]
        settings = Settings(min(prompts.new_tokens, prompts.longest - length))
        inputs = prompts.batch([row])
        after = _attempt(candidate, inputs, settings)
        before = reference.write(inputs, settings)
        counts.add("prompt_lengths", [f"a prompt of {length} tokens"], _compared(after, before))


def _measure_early_ends(counts: _Counts, reference: Writer, candidate: Writer, prompts: Prompts) -> None:
    """Compare texts that end with a token which the source model soon writes after the first prompt."""
    rows = prompts.rows[:_ALONE]
    inputs = prompts.batch(rows)
    written = reference.write(inputs, Settings(min(_ENDS_AFTER + 1, prompts.new_tokens)))
    settings = Settings(prompts.new_tokens, end_id=int(written.ids[0, -1]))
    partings = _compared(_attempt(candidate, inputs, settings), reference.write(inputs, settings))
    counts.add("early_ends", prompts.texts[: len(rows)], partings)


def _measure_beams(counts: _Counts, reference: Writer, candidate: Writer, prompts: Prompts) -> None:
    """Compare the best of two beams; texts whose scores are nearly equal may change places."""
    rows = prompts.rows[:_ALONE]
    inputs = prompts.batch(rows)
    settings = Settings(min(_BEAM_TOKENS, prompts.new_tokens), beams=_BEAMS)
    before, after = reference.write(inputs, settings), _attempt(candidate, inputs, settings)
    partings: list[Parting] = []
    for number in range(len(rows)):
        if after is None:
            partings.append("real")
        elif np.array_equal(before.ids[number], after.ids[number]):
            partings.append("none")
        else:
            assert before.scores is not None and after.scores is not None  # noqa: S101, PT018 - of a beam search
            gap = abs(float(before.scores[number]) - float(after.scores[number]))
            partings.append("near tie" if gap <= _BEAM_TIE else "real")
    counts.add("beams", prompts.texts[: len(rows)], partings)


def _too_long(candidate: Writer, prompts: Prompts) -> Parting:
    """Return "none" if the compiled model refuses a prompt that leaves no room for a token."""
    row = ([token for row in prompts.rows for token in row] * prompts.longest)[: prompts.longest]
    try:
        candidate.write(prompts.batch([row]), Settings(1))
    except InputError:
        return "none"
    except Exception:  # noqa: BLE001 - an error of the runtime is not a refusal
        return "real"
    return "real"
