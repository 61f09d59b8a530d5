"""Coverage: which shapes and which token ids the compiled model was compared at."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from compileflow.contracts import ComponentRecord
from compileflow.source_model.lengths import call_sizes
from compileflow.source_model.token_rows import TokenRows
from compileflow.validation.cases.case import Case


class Covered(BaseModel):
    """How many of all things of one kind the validation has met.

    Attributes:
        subject: Kind of thing, and what was done, such as "buckets compared".
        count: Number of things that were met.
        total: Number of all things.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    subject: str
    count: int = Field(ge=0)
    total: int = Field(ge=0)


class Coverage:
    """Counts shapes and token ids of the cases that were compared.

    Args:
        record: Record of the component. The shapes that must be compared are its buckets, if it has any.
        shapes: Shapes, (batch size, length), at which a dynamic component is compared.
        tokens: Form of the rows of a text model; None for images and audio.
    """

    def __init__(self, record: ComponentRecord, shapes: Collection[tuple[int, int]], tokens: TokenRows | None):
        self._main = record.inputs[0]
        self._dynamic = record.dynamic_axes
        buckets = {(bucket.batch_size, bucket.sequence_length) for bucket in record.shape_buckets}
        self._required = set(shapes) if record.dynamic_axes else buckets
        self._compared: set[tuple[int, int]] = set()
        self._text_ids = tokens.text_ids() if tokens else np.empty(0, np.int64)
        self._is_read = np.zeros(int(self._text_ids.max(initial=0)) + 1, bool)

    def add(self, case: Case) -> None:
        """Count a case that was compared, or that the compiled model failed on."""
        self._compared.add(call_sizes(self._main, case.inputs[self._main.name]))
        if self._text_ids.size:
            ids = case.inputs["input_ids"]
            if "attention_mask" in case.inputs:
                ids = ids[case.inputs["attention_mask"] == 1]
            self._is_read[ids[ids < len(self._is_read)]] = True

    def covered(self) -> tuple[Covered, ...]:
        """Return the counts for the report."""
        kind = "shapes" if self._dynamic else "buckets"
        shapes = Covered(
            subject=f"{kind} compared", count=len(self._required & self._compared), total=len(self._required)
        )
        if not self._text_ids.size:
            return (shapes,)
        read_count = int(self._is_read[self._text_ids].sum())
        return shapes, Covered(subject="token ids read", count=read_count, total=self._text_ids.size)

    def scalars(self) -> dict[str, float]:
        """Return the number of shapes that were left out, for the gate."""
        return {"shapes_left_out": float(len(self._required - self._compared))}
