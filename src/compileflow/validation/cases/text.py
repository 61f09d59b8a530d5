"""Cases of text models: generated shapes and odd texts, and batches of natural examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from compileflow.contracts import Arrays
from compileflow.errors import MeasurementError
from compileflow.spec import HfTask
from compileflow.validation.cases.case import Case
from compileflow.validation.cases.labels import Example, Truth

ODD_TEXTS = {
    "empty": "",
    "spaces": "   ",
    "one character": "a",
    "emoji": "\U0001f600\U0001f389 \U0001f469\u200d\U0001f469\u200d\U0001f467",
    "CJK": "東京は日本の首都です。",
    "zero-width": "zero\u200bwidth\u200djoined\ufeff",
    "unknown words": "qzxvwk jkqxz ßſƿ ҈҉ ‽⁂",
    "control characters": "tab\there\x07 and\x00 there",
}
_BATCH = 8
# Characters; longer tokens do not occur in natural text.
_LONGEST_TOKEN = 64

Row = dict[str, list[int]]


@dataclass(frozen=True)
class CaseBuilder:
    """Builds cases for one text model.

    Attributes:
        tokenizer: Tokenizer of the source model.
        input_names: Inputs of the compiled model.
        max_length: Maximum length in tokens.
        edges: Lengths at which the compiled model may switch to other code, such as the buckets' lengths.
        pad_token_id: Token that fills shorter rows.
        question: First text of each row, for tasks that read two texts.
        pad_left: Shorter rows are padded on the left.
    """

    tokenizer: Any
    input_names: tuple[str, ...]
    max_length: int
    edges: tuple[int, ...]
    pad_token_id: int
    question: str | None = None
    pad_left: bool = False

    @property
    def shortest(self) -> int:
        """Length of the shortest row that has all special tokens and some text."""
        pairs = self.question is not None
        return int(self.tokenizer.num_special_tokens_to_add(pair=pairs)) + (2 if pairs else 1)

    def encode(self, text: str, pair: str | None = None, *, max_length: int | None = None) -> Row:
        """Tokenize one text or pair; truncate it, but do not pad it."""
        if pair is None and self.question is not None:
            text, pair = self.question, text
        limit = max_length or self.max_length
        encoded = self._encoded(text, pair, limit, return_token_type_ids=True)
        ids = list(encoded["input_ids"])[:limit] or [self.pad_token_id]
        types = list(encoded.get("token_type_ids", ()))[: len(ids)] or [0] * len(ids)
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "token_type_ids": types}

    def with_offsets(self, text: str, pair: str | None = None) -> Any:
        """Return the encoding of one text or pair with the place of each token, which a fast tokenizer knows.

        Raises:
            MeasurementError: The tokenizer is not a fast one.
        """
        if not self.tokenizer.is_fast:
            raise MeasurementError(
                "The tokenizer cannot tell where in the text a token is, so the labels cannot be compared.",
                hint="Give examples without labels, or a model with a fast tokenizer.",
            )
        return self._encoded(text, pair, self.max_length, return_offsets_mapping=True)

    def _encoded(self, text: str, pair: str | None, limit: int, **parts: bool) -> Any:
        if pair is not None:
            # A fast tokenizer pairs all pieces that truncation cuts off, which takes minutes for a long text.
            pair = pair[: _LONGEST_TOKEN * limit]
        return self.tokenizer(text, pair, truncation=True, max_length=limit, padding=False, **parts)

    def collate(self, rows: Sequence[Row], *, left: bool | None = None) -> Arrays:
        """Pad rows to the longest one; the mask is 0 where a row is padded."""
        left = self.pad_left if left is None else left
        longest = max(len(row["input_ids"]) for row in rows)
        arrays = {}
        for name in self.input_names:
            fill = self.pad_token_id if name == "input_ids" else 0
            padded_rows = []
            for row in rows:
                space = [fill] * (longest - len(row[name]))
                padded_rows.append(space + row[name] if left else row[name] + space)
            arrays[name] = np.asarray(padded_rows, dtype=np.int64)
        return arrays

    def case(
        self,
        name: str,
        family: str,
        rows: Sequence[Row],
        texts: Sequence[str],
        *,
        left: bool | None = None,
        positions: tuple[int, ...] = (),
        truths: tuple[Truth | None, ...] = (),
        may_fail: bool = False,
    ) -> Case:
        """Build one case from encoded rows."""
        inputs = self.collate(rows, left=left)
        mask = inputs["attention_mask"]
        return Case(name, family, tuple(texts), inputs, mask, positions, may_fail, truths=truths)


def shape_cases(builder: CaseBuilder, sentences: Sequence[str]) -> list[Case]:
    """Build the generated cases: lengths around each edge, odd texts, paddings, and omitted inputs."""
    stream = " ".join(sentences[:200])
    cases = []
    lengths = {1, 2, 3, builder.max_length}
    for edge in builder.edges:
        lengths |= {edge - 1, edge, edge + 1}
    for length in sorted(n for n in lengths if 1 <= n <= builder.max_length):
        encoded = builder.encode(stream, max_length=max(length, builder.shortest))
        # A row that is too short for all special tokens keeps the last ones.
        row = {name: values[-length:] for name, values in encoded.items()}
        is_cut = length < builder.shortest
        description = f"natural text, {length} tokens"
        cases.append(builder.case(f"length {length}", "length", [row], [description], may_fail=is_cut))
    long_row = builder.encode(" ".join(sentences) * 4)
    cases.append(builder.case("beyond the maximum, truncated", "length", [long_row], ["all sentences"]))
    for name, text in ODD_TEXTS.items():
        cases.append(builder.case(name, "text", [builder.encode(text)], [text]))
    special_text = " ".join(str(token) for token in builder.tokenizer.all_special_tokens)
    cases.append(
        builder.case("special tokens", "text", [builder.encode(special_text)], [special_text], may_fail=True)
    )
    texts = sorted(sentences[:60], key=len)[:: 60 // 7][:7] if len(sentences) >= 60 else sentences[:7]
    rows = [builder.encode(text) for text in texts]
    cases.append(builder.case("ragged batch, padded right", "batch", rows, texts, left=False))
    cases.append(builder.case("ragged batch, padded left", "batch", rows, texts, left=True))
    cases.append(builder.case("the batch's first row alone", "batch", rows[:1], texts[:1]))
    pair = builder.encode(texts[0], texts[-1])
    cases.append(builder.case("text pair", "inputs", [pair], [f"{texts[0]} | {texts[-1]}"]))
    full_case = builder.case("", "inputs", rows[-1:], texts[-1:])
    for input_name in sorted(set(builder.input_names) - {"input_ids"}):
        inputs = {name: value for name, value in full_case.inputs.items() if name != input_name}
        neutral = np.full_like(full_case.inputs[input_name], 1 if input_name == "attention_mask" else 0)
        cases.append(
            Case(
                f"without {input_name}",
                "inputs",
                full_case.texts,
                inputs,
                full_case.mask,
                may_fail=True,
                same_as=inputs | {input_name: neutral},
            )
        )
    return cases


def agreement_cases(
    builder: CaseBuilder, examples: Sequence[Example], task: HfTask, truths: Sequence[Truth | None] = ()
) -> list[Case]:
    """Build natural batches of 8, sorted by length; fill-mask masks one word per row.

    Args:
        builder: Builder of the cases.
        examples: Natural examples.
        task: Task of the model.
        truths: Label of each example; empty without labels.
    """
    rows, texts, positions = [], [], []
    for example in examples:
        if "question" in example:
            row = builder.encode(example["question"], example["context"])
            text = f"{example['question']} | {example['context']}"
        else:
            row, text = builder.encode(example["text"]), example["text"]
        position = 0
        if task is HfTask.FILL_MASK:
            position = _mask_middle(row, builder.tokenizer)
        rows.append(row)
        texts.append(text)
        positions.append(position)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
    cases = []
    for start in range(0, len(order), _BATCH):
        batch = order[start : start + _BATCH]
        cases.append(
            builder.case(
                f"natural {start + 1} to {start + len(batch)}",
                "agreement",
                [rows[index] for index in batch],
                [texts[index] for index in batch],
                positions=tuple(positions[index] for index in batch),
                truths=tuple(truths[index] for index in batch) if truths else (),
            )
        )
    return cases


def _mask_middle(row: Row, tokenizer: Any) -> int:
    """Mask the middle token that is not special, and return its position."""
    if tokenizer.mask_token_id is None:
        raise MeasurementError(
            "The tokenizer has no mask token, so fill-mask cannot be validated.", hint="Choose another task."
        )
    special_ids = set(tokenizer.all_special_ids)
    word_positions = [index for index, token in enumerate(row["input_ids"]) if token not in special_ids]
    position = word_positions[len(word_positions) // 2] if word_positions else 0
    row["input_ids"][position] = tokenizer.mask_token_id
    return position
