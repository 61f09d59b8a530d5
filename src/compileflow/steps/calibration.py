"""Natural examples for static quantization: read in the compile step, tokenized in its child process.

Compileflow never calibrates a task on the built-in text that it judges the task by.
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
# Longer inputs take more time and memory, but hardly change the ranges of activations.
_LONGEST = 256
_MOST_UNKNOWN = 0.5


class CalibrationSettings(BaseModel):
    """Examples that a static int8 compile measures activations on; part of the cache key of such compiles only."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    examples_path: str | None = Field(
        None,
        min_length=1,
        title="Examples",
        description="File with natural examples that you do not validate with: text, one example on each line, or "
        "JSON lines or CSV. Empty: built-in text.",
    )
    max_examples: int = Field(
        256, ge=1, le=10_000, title="Examples at most", description="Largest number of examples to use."
    )


@dataclass(frozen=True)
class Calibration:
    """Calibration examples, and their record for the manifest."""

    examples: tuple[dict[str, str], ...]
    record: CalibrationRecord

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able form, for the child process of the compile."""
        return {"examples": list(self.examples), "record": self.record.model_dump(mode="json")}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Calibration:
        """Return the calibration that `to_json` returned as JSON."""
        return cls(tuple(data["examples"]), CalibrationRecord.model_validate(data["record"]))


def load_calibration(task: HfTask, settings: CalibrationSettings) -> Calibration:
    """Read the examples of a calibration.

    Raises:
        CompileError: The file is empty or unreadable, or its lines do not have the form of the task.
    """
    questions = task.reads_pairs
    # Use the built-in text of another task: validation judges this task by its own.
    other_task = HfTask.TEXT_CLASSIFICATION if questions else HfTask.QUESTION_ANSWERING
    try:
        if settings.examples_path is not None:
            examples, origin, digest = load_examples(task, settings.examples_path, settings.max_examples)
        else:
            builtin_examples, origin, digest = load_examples(other_task, None, settings.max_examples + 1)
            if questions:
                texts = [example["text"] for example in builtin_examples]
                examples = [{"question": question, "context": context} for question, context in pairwise(texts)]
            else:
                examples = [{"text": example["context"]} for example in builtin_examples]
            examples = examples[: settings.max_examples]
    except MeasurementError as error:
        raise CompileError(f"Calibration for int8: {error.message}", hint=error.hint) from error
    return Calibration(tuple(examples), CalibrationRecord(origin=origin, digest=digest, examples=len(examples)))


def calibration_batches(
    examples: Sequence[dict[str, str]], tokenizer: Any, *, task: HfTask, max_length: int, pad_token_id: int
) -> tuple[Arrays, ...]:
    """Tokenize examples into batches of 8 with rows of different lengths, shortest batch first.

    Raises:
        CompileError: The tokenizer does not know most of the words.
    """
    builder = CaseBuilder(
        tokenizer=tokenizer,
        input_names=_INPUTS,
        max_length=min(max_length, _LONGEST),
        edges=(),
        pad_token_id=pad_token_id,
    )
    cases = agreement_cases(builder, examples, task)
    special_tokens = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    tokens = [
        int(token)
        for case in cases
        for token in case.inputs["input_ids"][case.mask.astype(bool)]
        if int(token) not in special_tokens
    ]
    unknown_count = sum(token == tokenizer.unk_token_id for token in tokens)
    if not tokens or unknown_count > _MOST_UNKNOWN * len(tokens):
        raise CompileError(
            "The calibration examples do not fit the model: its tokenizer knows only "
            f"{len(tokens) - unknown_count} of their {len(tokens)} tokens.",
            hint="Give natural examples in the language of the model.",
        )
    return tuple(case.inputs for case in cases)
