"""Rows of text of exact lengths, filled with natural tokens or with every token id of the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod

import numpy as np
from numpy.typing import NDArray

from compileflow.contracts import Arrays, ComponentRecord
from compileflow.source_model.token_rows import TokenRows
from compileflow.validation.cases.case import Case
from compileflow.validation.cases.shapes import Shape, most_tokens, row_lengths, values_per_token

# Shape of the batches that read the vocabulary, where any shape runs.
_VOCABULARY_ROWS, _VOCABULARY_LENGTH = 32, 128
# An order of the ids; the same for all artifacts, so that the source model's answers can be reused.
_SEED = 20
# The answer to one token may have a value for each word. Then only some positions are compared, because all would
# take a minute, and each token changes the answers at other positions as well.
_VALUES_PER_POSITION = 2048
# Special tokens that are read at most, and the rows that repeat one of them: each third of a few natural tokens.
_MOST_SPECIAL, _SPECIAL_ROWS, _SPECIAL_CONTENT = 32, 4, 12
# Rows and tokens that are drawn from the artifact's digest.
_DRAWN_ROWS, _DRAWN_LENGTHS = 8, (12, 40)


class IdStream:
    """Token ids in a fixed order, from the start again after the last one.

    Attributes:
        taken: Number of ids that were taken.
    """

    def __init__(self, ids: NDArray[np.int64]):
        self._ids = ids
        self.taken = 0

    @property
    def size(self) -> int:
        """Number of different ids."""
        return len(self._ids)

    def take(self, count: int) -> NDArray[np.int64]:
        """Return the next ids."""
        ids = self._ids[(self.taken + np.arange(count)) % len(self._ids)]
        self.taken += count
        return ids


@dataclass(frozen=True)
class FilledRows:
    """Builds cases of exact shapes for one text component.

    Attributes:
        tokens: Form of the rows that the model takes.
        record: Record of the component.
        natural_ids: Token ids of natural text in its order, without special tokens.
        constant: Inputs that every case has, such as the image of a model that compares it with texts.
    """

    tokens: TokenRows
    record: ComponentRecord
    natural_ids: NDArray[np.int64]
    constant: Arrays

    @property
    def shortest(self) -> int:
        """Length of the shortest row that holds text."""
        return min(self.tokens.shortest, self.record.max_sequence_length)

    def shape_cases(self, shapes: Sequence[Shape], vocabulary: IdStream | None) -> list[Case]:
        """Build the cases of each shape; `vocabulary` fills the rows, or natural text where it is None."""
        ids = vocabulary or IdStream(self.natural_ids)
        cases = []
        for rows, length in shapes:
            calls = row_lengths(rows, length, self.shortest, dynamic=self.record.dynamic_axes)
            for number, lengths in enumerate(calls):
                name = f"shape {rows} x {length}" + (", ragged" if number else "")
                # Neither the mask nor the token types can be at fault where full rows of a bucket differ.
                has_types = self.record.dynamic_axes or number > 0
                cases.append(self.case(name, "shape", length, lengths, ids, has_types=has_types))
        return cases

    def vocabulary(self, most_ids: int) -> IdStream:
        """Return the ids that stand for text, at most so many of them; those of the natural text come last."""
        order = np.random.default_rng(_SEED).permutation(self.tokens.text_ids())
        is_natural = np.isin(order, self.natural_ids)
        return IdStream(np.concatenate([order[~is_natural], order[is_natural]])[:most_ids])

    def vocabulary_cases(self, vocabulary: IdStream, *, answers_only: bool) -> list[Case]:
        """Build batches of full rows until every id of the stream was taken once."""
        rows, length = self._vocabulary_shape()
        per_row = self.tokens.content(length)
        cases: list[Case] = []
        while (missing_ids := vocabulary.size - vocabulary.taken) > 0:
            count = rows if not self.record.dynamic_axes else min(rows, ceil(missing_ids / per_row))
            name = f"vocabulary {len(cases) + 1}"
            lengths = [length] * count
            cases.append(
                self.case(
                    name, "vocabulary", length, lengths, vocabulary, has_types=False, answers_only=answers_only
                )
            )
        return cases

    def drawn_cases(self, seed: int) -> list[Case]:
        """Build batches of natural text that begins at random places."""
        random = np.random.default_rng(seed)
        cases: list[Case] = []
        for most in _DRAWN_LENGTHS:
            length = max(self.shortest, min(most, self.record.max_sequence_length))
            stream = IdStream(np.roll(self.natural_ids, int(random.integers(len(self.natural_ids)))))
            lengths = [int(count) for count in random.integers(self.shortest, length + 1, _DRAWN_ROWS)]
            case = self.case(f"drawn {len(cases) + 1}", "drawn", max(lengths), lengths, stream)
            cases.append(replace(case, is_drawn=True))
        return cases

    def special_cases(self, special_tokens: Mapping[int, str]) -> list[Case]:
        """Build a batch for each special token, or for each n-th of many; its rows repeat it in natural text.

        Args:
            special_tokens: Special tokens that text may hold, such as `[MASK]`, by id.
        """
        ids = sorted(number for number in special_tokens if 0 <= number < self.tokens.vocab_size)
        length = min(self.tokens.shortest + _SPECIAL_CONTENT, self.record.max_sequence_length)
        count = self.tokens.content(length)
        cases: list[Case] = []
        for number in ids[:: max(1, ceil(len(ids) / _MOST_SPECIAL))]:
            natural = IdStream(self.natural_ids)
            # Each row holds the token equally often, because some models count the ends of the text.
            rows = [np.where(np.arange(count) % 3 == 1, number, natural.take(count)) for _ in range(_SPECIAL_ROWS)]
            stream, lengths = IdStream(np.concatenate(rows)), [length] * _SPECIAL_ROWS
            case = self.case(
                f"special token {special_tokens[number]}", "special", length, lengths, stream, has_types=False
            )
            # No tokenizer puts some of these tokens into a text.
            cases.append(replace(case, may_fail=True))
        return cases

    def padded_case(self, length: int) -> Case | None:
        """Build two padded rows of natural text for the mask's probe; None where no row is shorter."""
        if length <= self.shortest:
            return None
        lengths = [max(self.shortest, length - 4), max(self.shortest, length // 2)]
        return self.case(f"length {length}", "probe", length, lengths, IdStream(self.natural_ids))

    def full_case(self, length: int) -> Case:
        """Build one full row of natural text for the probe of token types."""
        return self.case(f"length {length}", "probe", length, [length], IdStream(self.natural_ids))

    def case(
        self,
        name: str,
        family: str,
        length: int,
        lengths: Sequence[int],
        ids: IdStream,
        *,
        has_types: bool = True,
        answers_only: bool = False,
    ) -> Case:
        """Build one call with rows of these lengths, padded to `length`, and of both token types if asked."""
        mask = np.zeros((len(lengths), length), np.int64)
        input_ids = np.full_like(mask, self.tokens.pad_token_id)
        types = np.zeros_like(mask)
        for row, size in enumerate(lengths):
            place = slice(length - size, None) if self.record.padding == "left" else slice(size)
            filled = self.tokens.filled(ids.take(self.tokens.content(size)))
            mask[row, place], input_ids[row, place] = 1, filled[len(filled) - size :]
            types[row, place] = _types(row, size) if has_types else 0
        arrays = {"input_ids": input_ids, "attention_mask": mask, "token_type_ids": types} | self.constant
        inputs = {tensor.name: arrays[tensor.name] for tensor in self.record.inputs}
        texts = tuple(f"{size} tokens" for size in lengths)
        # Answers about a whole row count whatever its length.
        counted = mask if "attention_mask" in inputs else np.ones((len(lengths), 1), int)
        stride = ceil(values_per_token(self.record.outputs) / _VALUES_PER_POSITION)
        # The first position of a row always counts, so that each row has one.
        is_counted = (np.arange(counted.shape[1]) - counted.argmax(axis=1)[:, None]) % stride == 0
        return Case(name, family, texts, inputs, counted * is_counted, answers_only=answers_only)

    def _vocabulary_shape(self) -> Shape:
        """Return the shape that reads the vocabulary: a large one, so that there are few calls."""
        if self.record.dynamic_axes:
            length = min(_VOCABULARY_LENGTH, self.record.max_sequence_length)
            return max(1, min(_VOCABULARY_ROWS, most_tokens(self.record.outputs) // length)), length
        buckets = [(bucket.batch_size, bucket.sequence_length) for bucket in self.record.shape_buckets]
        return max(buckets, key=prod)


def natural_ids(ids: NDArray[np.int64], tokens: TokenRows) -> NDArray[np.int64]:
    """Return the ids of natural text without special tokens; all ids that stand for text where nothing is left."""
    text_ids = tokens.text_ids()
    kept_ids = ids[np.isin(ids, text_ids)]
    return kept_ids if kept_ids.size else text_ids


def _types(row: int, size: int) -> NDArray[np.int64]:
    """Return the token types of a row: both, one, both with an early change, or both the other way round."""
    second = (np.arange(size) >= size // (3 if row % 4 == 2 else 2)).astype(np.int64)
    return (second, np.zeros_like(second), second, 1 - second)[row % 4]
