"""Registered tests: a source version's test files with inputs, parameters and predictions."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from compileflow.contracts.sources import INPUTS_FILE, PARAMETERS_FILE, PREDICTIONS_FILE
from compileflow.errors import CompileflowError, MeasurementError, first_line
from compileflow.spec import HfTask

# Above the noise between versions of torch and CPUs, below any difference that matters in a score.
_TOLERANCE = 1e-2

# The parameters that a version may choose, with plain values. Others of a pipeline import code, open files or
# start processes.
_PARAMETERS = frozenset(
    (
        *("aggregation_strategy", "batch_size", "candidate_labels", "doc_stride", "function_to_apply"),
        *("handle_impossible_answer", "hypothesis_template", "ignore_labels", "max_answer_len", "max_length"),
        *("max_question_len", "max_seq_len", "multi_label", "normalize", "padding", "stride", "targets"),
        *("threshold", "top_k", "truncation"),
        # Of text generation.
        *("do_sample", "early_stopping", "length_penalty", "max_new_tokens", "min_new_tokens"),
        *("no_repeat_ngram_size", "num_beams", "repetition_penalty", "return_full_text", "temperature", "top_p"),
    )
)
_OTHER_PARAMETERS = "its parameters are not those of the pipeline, so its predictions were not judged"


@dataclass(frozen=True)
class RegisteredTests:
    """Inputs for a pipeline, and its answers at the time of registration.

    Attributes:
        inputs: One item per call: a text, an object with question and context, or a list of two texts.
        parameters: Keyword arguments of each call.
        predictions: One answer per input; None if the version has none.
        note: Why the predictions are not judged, for the report; "" if they are.
    """

    inputs: tuple[Any, ...]
    parameters: Mapping[str, Any]
    predictions: tuple[Any, ...] | None
    note: str = ""

    def examples(self, hf_task: HfTask) -> list[dict[str, str]]:
        """Return the inputs that can serve as natural examples of a text task."""
        if hf_task.reads_pairs:
            fields = ("question", "context")
            pairs = [
                [item.get(name) for name in fields] if isinstance(item, dict) else item for item in self.inputs
            ]
            return [
                dict(zip(fields, pair, strict=True))
                for pair in pairs
                if isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
            ]
        return [{"text": item} for item in self.inputs if isinstance(item, str)]

    def disagreement(self, answers: list[Any]) -> float:
        """Return the share of registered predictions that differ from the answers, 0 to 1.

        Words, labels and positions must be equal. Numbers may differ by 0.01 or 1 %, whichever is more.
        """
        predictions = self.predictions or ()
        misses = sum(not _agree(before, after) for before, after in zip(predictions, answers, strict=True))
        return misses / len(predictions)


@dataclass(frozen=True)
class AnsweredTests:
    """Registered tests after the compiled model answered them.

    Attributes:
        tests: The tests; the note says why predictions were not judged.
        answers: Answers of the compiled model; None if the inputs are not those of its task.
        disagreement: See `RegisteredTests.disagreement`; None if nothing was judged.
    """

    tests: RegisteredTests
    answers: list[Any] | None
    disagreement: float | None


def answer_tests(tests: RegisteredTests, pipeline: Callable[..., Any], hf_task: HfTask) -> AnsweredTests:
    """Answer registered tests with a pipeline, and compare the answers if predictions have the pipeline's format.

    Teams also register the inputs and answers of a service around the model, such as keywords with their scores.
    These are reported, and not judged.

    Raises:
        MeasurementError: The inputs are those of the task, but the pipeline does not answer them.
    """
    kind = dict if hf_task.graph_task is HfTask.QUESTION_ANSWERING else str
    if hf_task.modality == "text":
        fits = all(isinstance(item, kind) for item in tests.inputs)
    else:
        # A pipeline for images or recordings would open the file or address that a text names.
        fits = not _holds_text(tests.inputs)
    if not fits:
        note = f"they are not inputs of a {hf_task.value} pipeline, so its predictions were not judged"
        return AnsweredTests(replace(tests, note=note), None, None)
    try:
        answers = answers_to(tests, pipeline)
    except MeasurementError:
        if not tests.parameters:
            raise
        answers = answers_to(replace(tests, parameters={}), pipeline)
        return AnsweredTests(replace(tests, parameters={}, note=_OTHER_PARAMETERS), answers, None)
    if tests.predictions is None or tests.note:
        return AnsweredTests(tests, answers, None)
    if not _same_format(list(tests.predictions), answers):
        note = "its predictions do not have the format of the pipeline, so they were not judged"
        return AnsweredTests(replace(tests, note=note), answers, None)
    return AnsweredTests(tests, answers, tests.disagreement(answers))


def _same_format(before: Any, after: Any) -> bool:
    """Return whether two answers are built alike: the same keys, and lists of the same kinds, of any length."""
    before, after = (
        value[0] if isinstance(value, list) and len(value) == 1 and isinstance(other, dict) else value
        for value, other in ((before, after), (after, before))
    )
    if isinstance(before, dict) and isinstance(after, dict):
        return before.keys() == after.keys() and all(_same_format(before[name], after[name]) for name in before)
    if isinstance(before, list) and isinstance(after, list):
        return all(_same_format(*pair) for pair in product(before[:1], after[:1])) and all(
            _same_format(values[0], value) for values in (before, after) for value in values[1:]
        )
    # Numbers that are not finite are stored as null.
    kinds = {_kind(value) for value in (before, after)} - {"null"}
    return len(kinds) <= 1


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return "number"
    return type(value).__name__


def read_registered_tests(folder: Path) -> RegisteredTests:
    """Read the test files of a version. Parameters that are not allowed are left out, and a note says so.

    Raises:
        MeasurementError: A file is not JSON, or does not have the form of a test file.
    """
    inputs = _read(folder / INPUTS_FILE, list)
    predictions = _read(folder / PREDICTIONS_FILE, list) if (folder / PREDICTIONS_FILE).exists() else None
    if not inputs:
        raise MeasurementError(
            f"The source version's {INPUTS_FILE} is empty.", hint="Register the version with some inputs."
        )
    if predictions is not None and len(predictions) != len(inputs):
        raise MeasurementError(
            f"The source version has {len(inputs)} test inputs and {len(predictions)} predictions.",
            hint="Register the version with one prediction per input.",
        )
    parameters = _read(folder / PARAMETERS_FILE, dict) if (folder / PARAMETERS_FILE).exists() else {}
    note = "" if all(_is_allowed(*item) for item in parameters.items()) else _OTHER_PARAMETERS
    return RegisteredTests(
        tuple(inputs), {} if note else parameters, None if predictions is None else tuple(predictions), note
    )


def _is_allowed(name: str, value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return name in _PARAMETERS and not any(isinstance(item, (dict, list)) for item in values)


def _holds_text(value: Any) -> bool:
    if isinstance(value, (dict, list, tuple)):
        return any(map(_holds_text, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str)


def write_registered_tests(tests: RegisteredTests, predictions: list[Any], folder: Path) -> None:
    """Write the tests into a new folder, with the compiled model's answers as predictions."""
    folder.mkdir()
    for name, value in (
        (INPUTS_FILE, list(tests.inputs)),
        (PARAMETERS_FILE, dict(tests.parameters)),
        (PREDICTIONS_FILE, predictions),
    ):
        (folder / name).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")


def plain(value: Any) -> Any:
    """Turn a pipeline's answer into JSON values: arrays into lists, and numbers that are not finite into None."""
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _agree(before: Any, after: Any) -> bool:
    # transformers answers one text with a list of one item, and several texts with a flat list.
    if isinstance(before, dict) and isinstance(after, list) and len(after) == 1:
        return _agree(before, after[0])
    if isinstance(after, dict) and isinstance(before, list) and len(before) == 1:
        return _agree(before[0], after)
    if isinstance(before, dict) and isinstance(after, dict):
        return before.keys() == after.keys() and all(_agree(before[name], after[name]) for name in before)
    if isinstance(before, list) and isinstance(after, list):
        return len(before) == len(after) and all(_agree(*pair) for pair in zip(before, after, strict=True))
    numbers = [
        value for value in (before, after) if isinstance(value, (int, float)) and not isinstance(value, bool)
    ]
    if len(numbers) == 2 and float in map(type, numbers):
        try:
            return math.isclose(before, after, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
        except OverflowError:
            # A JSON integer may be too large for a float.
            return False
    return bool(before == after)


def _read(path: Path, kind: type) -> Any:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise MeasurementError(
            f"The source version's {path.name} cannot be read: {error}.",
            hint="Register the version again, with JSON files.",
        ) from error
    if not isinstance(value, kind):
        expected = "list" if kind is list else "object"
        raise MeasurementError(
            f"Expected a JSON {expected} in the source version's {path.name}, got {type(value).__name__}.",
            hint="Register the version again, with a file of that form.",
        )
    return value


def answers_to(tests: RegisteredTests, pipeline: Callable[..., Any]) -> list[Any]:
    """Return a pipeline's answers, one per input.

    Raises:
        MeasurementError: The pipeline refuses the inputs or parameters, or does not give one answer per input.
    """
    hint = "Correct inputs.json and inference_params.json of the source version."
    try:
        answers = plain(pipeline(list(tests.inputs), **tests.parameters))
    except CompileflowError:
        raise
    except Exception as error:
        raise MeasurementError(
            f"The source version's test inputs cannot be answered: {type(error).__name__}: {first_line(error)}.",
            hint=hint,
        ) from error
    if isinstance(answers, list) and len(answers) == len(tests.inputs):
        return answers
    # The answer to a single question comes without a list.
    if len(tests.inputs) == 1:
        return [answers]
    raise MeasurementError(
        f"Expected one answer for each of the source version's {len(tests.inputs)} test inputs, got "
        f"{len(answers) if isinstance(answers, list) else type(answers).__name__}.",
        hint=hint,
    )
