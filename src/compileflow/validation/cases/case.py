"""A case: one call that both models answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from compileflow.contracts import Arrays


@dataclass(frozen=True)
class Case:
    """One call of both models.

    Attributes:
        name: Unique, readable name.
        family: Kind of case: length, text, batch, inputs, signal or agreement.
        texts: One readable name per row for the report; for text tasks, the text itself.
        inputs: Arrays that both models get, batch first.
        mask: 1 where a position counts. Nothing else is compared.
        positions: For fill-mask, the masked position of each row.
        may_fail: The source model may refuse these inputs, because no tokenizer makes them. The case is then left
            out, with a note in the report.
        same_as: Inputs to which the source model should give the same answer, as the compiled model does. If it
            does not, the case is left out as well.
    """

    name: str
    family: str
    texts: tuple[str, ...]
    inputs: Arrays
    mask: Any
    positions: tuple[int, ...] = field(default=())
    may_fail: bool = False
    same_as: Arrays | None = None
