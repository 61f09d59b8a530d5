"""Cases of models that compare one image with several texts, such as CLIP: odd images, few and many texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from compileflow.contracts import Arrays, ComponentRecord
from compileflow.source_model.processor import Processor
from compileflow.source_model.token_rows import TokenRows
from compileflow.validation.cases.case import Case
from compileflow.validation.cases.filled_rows import FilledRows, natural_ids
from compileflow.validation.cases.generated_signals import NamedSignal, generated_signals, odd_signals

LABELS = ("cat", "dog", "car", "tree", "house", "person", "boat", "street")
# The template of transformers' pipeline.
_TEMPLATE = "This is a photo of {}."
# Models without a mask read padding as they were trained: as far as transformers' pipeline pads their texts.
_PADDED_LENGTH = 64


@dataclass(frozen=True)
class ImageTextCases:
    """Builds cases for one compiled component.

    Attributes:
        tokenizer: Tokenizer of the source model.
        processor: Image processor of the source model.
        record: Interface of the component.
    """

    tokenizer: Any
    processor: Processor
    record: ComponentRecord

    def case(self, name: str, family: str, image: NamedSignal, labels: Sequence[str]) -> Case:
        """Build the case of one image and several labels, one row each."""
        texts = [_TEMPLATE.format(label) for label in labels]
        return self._case(name, family, texts, self._tokens(texts) | self.processor([image.values]))

    def generated(self) -> list[Case]:
        """Build the cases that natural images do not cover: odd images, few labels, labels of several lengths."""
        (image,) = generated_signals(self.processor, 1)
        cases = [self.case(signal.name, "signal", signal, LABELS) for signal in odd_signals(self.processor)]
        cases += [self.case(f"{rows} labels", "batch", image, LABELS[:rows]) for rows in (1, 2, 3)]
        longest = " and a ".join(LABELS * 20)
        cases.append(self.case("a label beyond the maximum, truncated", "length", image, [longest]))
        cases.append(
            self.case("labels of three lengths", "length", image, [LABELS[0], longest[:60], "\U0001f600"])
        )
        return cases

    def timed(self, rows: int, length: int) -> Case:
        """Build the call for timing one shape."""
        (image,) = generated_signals(self.processor, 1)
        texts = [" ".join(LABELS * length)] * rows
        inputs = self._tokens(texts, length) | self.processor([image.values])
        return self._case(f"timed {rows} x {length}", "timed", texts, inputs)

    def filled_rows(self, tokens: TokenRows, seed: int) -> FilledRows:
        """Return the builder of exact shapes, beside an image that the seed draws."""
        (image,) = generated_signals(self.processor, 1, seed=seed)
        ids = self._tokens([_TEMPLATE.format(label) for label in LABELS])["input_ids"].ravel()
        return FilledRows(tokens, self.record, natural_ids(ids, tokens), self.processor([image.values]))

    def _case(self, name: str, family: str, texts: Sequence[str], arrays: Arrays) -> Case:
        inputs = {record.name: arrays[record.name] for record in self.record.inputs}
        return Case(name, family, tuple(texts), inputs, np.ones((len(texts), 1), int))

    def _tokens(self, texts: Sequence[str], length: int | None = None) -> Arrays:
        longest = self.record.max_sequence_length
        has_mask = any(record.name == "attention_mask" for record in self.record.inputs)
        limit = min(longest, length or (longest if has_mask else _PADDED_LENGTH))
        encoded = self.tokenizer(
            list(texts),
            padding=True if has_mask else "max_length",
            truncation=True,
            max_length=limit,
            return_tensors="np",
        )
        return {name: np.asarray(value, np.int64) for name, value in encoded.items()}
