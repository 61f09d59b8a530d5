"""The inputs of a validation: generated shape and crash cases, and natural examples for agreement."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from compileflow.contracts import Arrays
from compileflow.errors import MeasurementError
from compileflow.spec import HfTask

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


@dataclass(frozen=True)
class Case:
    """One call of both models.

    Attributes:
        name: Unique, readable.
        family: length, text, batch, inputs, or agreement.
        texts: What was tokenized, a row each, for the report.
        inputs: int64 arrays of shape (batch, sequence).
        mask: 1 where a token counts; nothing else is compared.
        positions: For fill-mask, the masked position of each row.
    """

    name: str
    family: str
    texts: tuple[str, ...]
    inputs: Arrays
    mask: Any
    positions: tuple[int, ...] = field(default=())


@dataclass(frozen=True)
class CaseBuilder:
    """Builds inputs for one model.

    Attributes:
        tokenizer: The source model's own.
        input_names: What the graph takes.
        max_length: Longest input in tokens.
        edges: Lengths at which something changes in the compiled graph: the buckets' lengths.
        pad_token_id: Fills rows.
    """

    tokenizer: Any
    input_names: tuple[str, ...]
    max_length: int
    edges: tuple[int, ...]
    pad_token_id: int

    def encode(self, text: str, pair: str | None = None, *, max_length: int | None = None) -> dict[str, list[int]]:
        """Tokenize one text or pair, truncated, unpadded."""
        limit = max_length or self.max_length
        encoded = self.tokenizer(
            text, pair, truncation=True, max_length=limit, padding=False, return_token_type_ids=True
        )
        ids = list(encoded["input_ids"])[:limit] or [self.pad_token_id]
        types = list(encoded.get("token_type_ids", ()))[: len(ids)] or [0] * len(ids)
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "token_type_ids": types}

    def collate(self, rows: Sequence[dict[str, list[int]]], *, left: bool = False) -> Arrays:
        """Pad rows to the longest, with the mask 0 where padded."""
        longest = max(len(row["input_ids"]) for row in rows)
        arrays = {}
        for name in self.input_names:
            fill = self.pad_token_id if name == "input_ids" else 0
            padded = []
            for row in rows:
                space = [fill] * (longest - len(row[name]))
                padded.append(space + row[name] if left else row[name] + space)
            arrays[name] = np.asarray(padded, dtype=np.int64)
        return arrays

    def case(
        self,
        name: str,
        family: str,
        rows: Sequence[dict[str, list[int]]],
        texts: Sequence[str],
        *,
        left: bool = False,
        positions: tuple[int, ...] = (),
    ) -> Case:
        """Make one case of encoded rows."""
        inputs = self.collate(rows, left=left)
        return Case(name, family, tuple(texts), inputs, inputs["attention_mask"], positions)


def shape_cases(builder: CaseBuilder, sentences: Sequence[str]) -> list[Case]:
    """Build the generated cases: lengths around each edge, odd texts, paddings, and inputs left out."""
    stream = " ".join(sentences[:200])
    cases = []
    lengths = {1, 2, 3, builder.max_length}
    for edge in builder.edges:
        lengths |= {edge - 1, edge, edge + 1}
    for length in sorted(n for n in lengths if 1 <= n <= builder.max_length):
        row = _cut(builder.encode(stream, max_length=max(length, 4)), length)
        cases.append(builder.case(f"length {length}", "length", [row], [f"natural text, {length} tokens"]))
    beyond = builder.encode(" ".join(sentences) * 4)
    cases.append(builder.case("beyond the maximum, truncated", "length", [beyond], ["all sentences"]))
    for name, text in ODD_TEXTS.items():
        cases.append(builder.case(name, "text", [builder.encode(text)], [text]))
    special = " ".join(str(token) for token in builder.tokenizer.all_special_tokens)
    cases.append(builder.case("special tokens", "text", [builder.encode(special)], [special]))
    picked = sorted(sentences[:60], key=len)[:: 60 // 7][:7] if len(sentences) >= 60 else sentences[:7]
    rows = [builder.encode(text) for text in picked]
    cases.append(builder.case("ragged batch, padded right", "batch", rows, picked))
    cases.append(builder.case("ragged batch, padded left", "batch", rows, picked, left=True))
    cases.append(builder.case("the batch's first row alone", "batch", rows[:1], picked[:1]))
    pair = builder.encode(picked[0], picked[-1])
    cases.append(builder.case("text pair", "inputs", [pair], [f"{picked[0]} | {picked[-1]}"]))
    full = builder.case("", "inputs", rows[-1:], picked[-1:])
    for left_out in sorted(set(builder.input_names) - {"input_ids"}):
        inputs = {name: value for name, value in full.inputs.items() if name != left_out}
        cases.append(Case(f"without {left_out}", "inputs", full.texts, inputs, full.mask))
    return cases


def agreement_cases(builder: CaseBuilder, examples: Sequence[dict[str, str]], task: HfTask) -> list[Case]:
    """Build natural batches of 8, sorted by length; a masked word each for fill-mask."""
    rows, texts, positions = [], [], []
    for example in examples:
        if "question" in example:
            row = builder.encode(example["question"], example["context"])
            text = f"{example['question']} | {example['context']}"
        else:
            row, text = builder.encode(example["text"]), example["text"]
        position = 0
        if task is HfTask.FILL_MASK:
            position = _mask_one(row, builder.tokenizer)
        rows.append(row)
        texts.append(text)
        positions.append(position)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
    cases = []
    for start in range(0, len(order), _BATCH):
        chosen = order[start : start + _BATCH]
        cases.append(
            builder.case(
                f"natural {start + 1} to {start + len(chosen)}",
                "agreement",
                [rows[index] for index in chosen],
                [texts[index] for index in chosen],
                positions=tuple(positions[index] for index in chosen),
            )
        )
    return cases


def load_examples(task: HfTask, path: str | None, limit: int) -> tuple[list[dict[str, str]], str, str]:
    """Read natural examples: the user's own, or the ones that compileflow carries.

    Returns:
        The examples ({"text": ...}, or {"question": ..., "context": ...}), where they come from, and the
        SHA-256 of that file.

    Raises:
        MeasurementError: the file cannot be read, or holds no example of the task's form.
    """
    questions = task is HfTask.QUESTION_ANSWERING
    try:
        if path is not None:
            origin, body = Path(path).name, Path(path).expanduser().read_bytes()
        else:
            origin = "questions_en.jsonl" if questions else "sentences_en.txt"
            body = (files("compileflow.validation") / "data" / origin).read_bytes()
            origin = f"compileflow's own {origin}"
        # Not splitlines: U+2028 and its like may stand inside a JSON string.
        lines = body.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
        examples = [_example(line, questions) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise MeasurementError(
            f"The examples in {path} cannot be used: {error}.",
            hint='Give a text file, one example a line, or JSON lines with "question" and "context".',
        ) from error
    if not examples:
        raise MeasurementError(f"{path} holds no example.", hint="Give at least one; 300 decide most gates.")
    return examples[:limit], origin, hashlib.sha256(body).hexdigest()


def _example(line: str, questions: bool) -> dict[str, str]:
    wanted = ("question", "context") if questions else ("text",)
    if line.startswith("{"):
        data = json.loads(line)
        if not all(isinstance(data.get(name), str) for name in wanted):
            raise ValueError(f"a line has no {' and '.join(wanted)}: {line[:80]}")
        return {name: data[name] for name in wanted}
    if questions:
        raise ValueError(f"a line is not JSON with question and context: {line[:80]}")
    return {"text": line}


def _cut(row: dict[str, list[int]], length: int) -> dict[str, list[int]]:
    return {name: values[:length] for name, values in row.items()}


def _mask_one(row: dict[str, list[int]], tokenizer: Any) -> int:
    """Mask the middle token that is not special, and return its position."""
    if tokenizer.mask_token_id is None:
        raise MeasurementError(
            "The tokenizer has no mask token, so fill-mask cannot be proven.", hint="Choose another task."
        )
    special = set(tokenizer.all_special_ids)
    free = [index for index, token in enumerate(row["input_ids"]) if token not in special]
    position = free[len(free) // 2] if free else 0
    row["input_ids"][position] = tokenizer.mask_token_id
    return position
