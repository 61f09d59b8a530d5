"""A case: one call that both models answer."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from compileflow.contracts import Arrays
from compileflow.validation.cases.labels import Truth


@dataclass(frozen=True)
class Case:
    """One call of both models.

    Attributes:
        name: Unique, readable name.
        family: Kind of case: length, text, special, batch, inputs, signal, shape, vocabulary, drawn, timed or
            agreement.
        texts: One readable name per row for the report; for text tasks, the text itself.
        inputs: Arrays that both models get, batch first.
        mask: 1 where a position counts. Nothing else is compared.
        positions: For fill-mask, the masked position of each row.
        truths: Label of each row; None where it is unknown, empty if all are.
        may_fail: The source model may refuse these inputs, because no tokenizer makes them. The case is then left
            out, with a note in the report.
        same_as: Inputs to which the source model should give the same answer, as the compiled model does. If it
            does not, the case is left out as well.
        answers_only: The candidate must answer with finite numbers. They are not compared with the source model's.
        is_drawn: The inputs are drawn from the artifact's digest, so they differ from artifact to artifact.
    """

    name: str
    family: str
    texts: tuple[str, ...]
    inputs: Arrays
    mask: Any
    positions: tuple[int, ...] = field(default=())
    truths: tuple[Truth | None, ...] = field(default=(), kw_only=True)
    may_fail: bool = False
    same_as: Arrays | None = None
    answers_only: bool = False
    is_drawn: bool = False

    def is_plain(self, bucket_lengths: Collection[int]) -> bool:
        """Whether no row is padded or has token types, so that neither the mask nor the types can matter.

        Args:
            bucket_lengths: Lengths of the shape buckets; the compiled model pads all others. Empty: it pads none.
        """
        mask, types = (self.inputs.get(name) for name in ("attention_mask", "token_type_ids"))
        has_plain_values = (mask is None or bool(mask.all())) and (types is None or not types.any())
        lengths = {value.shape[1] for value in (mask, self.inputs.get("input_ids")) if value is not None}
        return has_plain_values and (not bucket_lengths or lengths <= set(bucket_lengths))
