"""Natural examples for static quantisation: read in the compile step, tokenized in its fresh process.

What compileflow carries for calibration is never what it carries for judging the same task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from compileflow.artifact.manifest import CalibrationRecord
from compileflow.contracts import Arrays
from compileflow.errors import CompileError, MeasurementError
from compileflow.spec import HfTask
from compileflow.validation.cases import CaseBuilder, agreement_cases, load_examples

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
# Longer inputs add time and memory, and hardly change the ranges of activations.
_LONGEST = 256
_MOST_UNKNOWN = 0.5
_FORMS = 'Give a text file, one example a line, or JSON lines with "text", or "question" and "context".'


class CalibrationSettings(BaseModel):
    """What a static int8 compile looks at; part of its cache key, and of no other's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    examples_path: str | None = Field(
        None,
        title="Examples",
        description="Your own natural examples, other ones than you validate with: a text file, one a line, or "
        "JSON lines. Empty: text that compileflow carries.",
    )
    max_examples: int = Field(
        256, ge=1, le=10_000, title="Examples at most", description="Examples that are looked at."
    )


@dataclass(frozen=True)
class Calibration:
    """Examples with their record for the manifest."""

    examples: tuple[dict[str, str], ...]
    record: CalibrationRecord

    def to_json(self) -> dict[str, Any]:
        """Return a form that crosses to the compile's process."""
        return {"examples": list(self.examples), "record": self.record.model_dump(mode="json")}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Calibration:
        """Read what `to_json` wrote."""
        return cls(tuple(data["examples"]), CalibrationRecord.model_validate(data["record"]))


def load_calibration(task: HfTask, settings: CalibrationSettings) -> Calibration:
    """Read the examples of a calibration.

    Raises:
        CompileError: the file is empty, cannot be read, or its lines are not of the task's form.
    """
    questions = task is HfTask.QUESTION_ANSWERING
    # The other task's file, so that nobody is judged on what was calibrated on.
    carried = HfTask.TEXT_CLASSIFICATION if questions else HfTask.QUESTION_ANSWERING
    try:
        if settings.examples_path is not None:
            examples, origin, digest = load_examples(task, settings.examples_path, settings.max_examples)
        else:
            found, origin, digest = load_examples(carried, None, settings.max_examples + 1)
            if questions:
                texts = [example["text"] for example in found]
                examples = [{"question": a, "context": b} for a, b in pairwise(texts)]
            else:
                examples = [{"text": example["context"]} for example in found]
            examples = examples[: settings.max_examples]
    except MeasurementError as error:
        raise CompileError(f"Calibration for int8: {error.message}", hint=_FORMS) from error
    return Calibration(tuple(examples), CalibrationRecord(origin=origin, digest=digest, examples=len(examples)))


def calibration_batches(
    examples: Sequence[dict[str, str]], tokenizer: Any, *, task: HfTask, max_length: int, pad_token_id: int
) -> tuple[Arrays, ...]:
    """Tokenize examples into ragged batches of 8, shortest first.

    Raises:
        CompileError: the tokenizer does not know most of their words.
    """
    builder = CaseBuilder(
        tokenizer=tokenizer,
        input_names=_INPUTS,
        max_length=min(max_length, _LONGEST),
        edges=(),
        pad_token_id=pad_token_id,
    )
    cases = agreement_cases(builder, examples, task)
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    tokens = [
        int(token)
        for case in cases
        for token in case.inputs["input_ids"][case.mask.astype(bool)]
        if int(token) not in special
    ]
    unknown = sum(token == tokenizer.unk_token_id for token in tokens)
    if not tokens or unknown > _MOST_UNKNOWN * len(tokens):
        raise CompileError(
            f"The calibration examples are unlike the model's inputs: its tokenizer knows {len(tokens) - unknown} "
            f"of their {len(tokens)} tokens.",
            hint="Give natural examples in the model's own language.",
        )
    return tuple(case.inputs for case in cases)
