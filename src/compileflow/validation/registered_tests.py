"""The test files of a registered source version: inputs, parameters, and what it answered."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compileflow.contracts.sources import INPUTS_FILE, PARAMETERS_FILE, PREDICTIONS_FILE
from compileflow.errors import CompileflowError, MeasurementError, first_line
from compileflow.spec import HfTask

# Above the noise between versions of torch and CPUs, below what anyone would see in a score.
_TOLERANCE = 1e-2


@dataclass(frozen=True)
class RegisteredTests:
    """What a pipeline is called with, and what it answered when the version was registered.

    Attributes:
        inputs: One item a call: texts, or objects with question and context.
        parameters: Keyword arguments of each call.
        predictions: One item an input; None where the version has none.
    """

    inputs: tuple[Any, ...]
    parameters: Mapping[str, Any]
    predictions: tuple[Any, ...] | None

    def examples(self, hf_task: HfTask) -> list[dict[str, str]]:
        """Return the inputs that are natural examples of a text task; others are only predicted."""
        if hf_task.graph_task is HfTask.QUESTION_ANSWERING:
            wanted = ("question", "context")
            pairs = [item for item in self.inputs if isinstance(item, dict)]
            return [
                {n: item[n] for n in wanted} for item in pairs if all(isinstance(item.get(n), str) for n in wanted)
            ]
        return [{"text": item} for item in self.inputs if isinstance(item, str)]

    def disagreement(self, found: list[Any]) -> float:
        """Return the share of registered predictions that `found` does not give again, 0 to 1.

        Words, labels and positions must be equal; numbers agree within 0.01 + 1 % of their size.
        """
        registered = self.predictions or ()
        misses = sum(not _agree(was, now) for was, now in zip(registered, found, strict=True))
        return misses / len(registered)


def read_registered_tests(folder: Path) -> RegisteredTests:
    """Read the test files of a version.

    Raises:
        MeasurementError: a file is no JSON, or has not the form of a test file.
    """
    inputs = _read(folder / INPUTS_FILE, list)
    predictions = _read(folder / PREDICTIONS_FILE, list) if (folder / PREDICTIONS_FILE).exists() else None
    if not inputs:
        raise MeasurementError(
            f"The source version's {INPUTS_FILE} holds nothing.", hint="Register it with some inputs."
        )
    if predictions is not None and len(predictions) != len(inputs):
        raise MeasurementError(
            f"The source version has {len(inputs)} test inputs and {len(predictions)} predictions.",
            hint="Register as many predictions as inputs.",
        )
    parameters = _read(folder / PARAMETERS_FILE, dict) if (folder / PARAMETERS_FILE).exists() else {}
    return RegisteredTests(tuple(inputs), parameters, None if predictions is None else tuple(predictions))


def write_registered_tests(tests: RegisteredTests, predictions: list[Any], folder: Path) -> None:
    """Write the same inputs and parameters, with what the compiled model answers, into a new folder."""
    folder.mkdir()
    for name, value in (
        (INPUTS_FILE, list(tests.inputs)),
        (PARAMETERS_FILE, dict(tests.parameters)),
        (PREDICTIONS_FILE, predictions),
    ):
        (folder / name).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")


def plain(value: Any) -> Any:
    """Turn a pipeline's answer into what JSON has: arrays to lists, their numbers to Python's, NaN to None."""
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _agree(was: Any, now: Any) -> bool:
    # transformers answers one text with a list of one, and several with a flat list.
    if isinstance(was, dict) and isinstance(now, list) and len(now) == 1:
        return _agree(was, now[0])
    if isinstance(now, dict) and isinstance(was, list) and len(was) == 1:
        return _agree(was[0], now)
    if isinstance(was, dict) and isinstance(now, dict):
        return was.keys() == now.keys() and all(_agree(was[name], now[name]) for name in was)
    if isinstance(was, list) and isinstance(now, list):
        return len(was) == len(now) and all(_agree(*pair) for pair in zip(was, now, strict=True))
    numbers = [each for each in (was, now) if isinstance(each, (int, float)) and not isinstance(each, bool)]
    if len(numbers) == 2 and float in map(type, numbers):
        try:
            return math.isclose(was, now, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
        except OverflowError:
            # JSON has integers that no float holds.
            return False
    return bool(was == now)


def _read(path: Path, kind: type) -> Any:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise MeasurementError(
            f"The source version's {path.name} cannot be read: {error}.", hint="Register it again, as JSON."
        ) from error
    if not isinstance(value, kind):
        form = "list" if kind is list else "object"
        raise MeasurementError(f"The source version's {path.name} is no JSON {form}.", hint="Register it again.")
    return value


def answers_to(tests: RegisteredTests, pipeline: Callable[..., Any]) -> list[Any]:
    """Return what a pipeline answers, one item an input.

    Raises:
        MeasurementError: it does not take these inputs or parameters, or answers more or less.
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
    # A lone question's answer comes without a list.
    if len(tests.inputs) == 1:
        return [answers]
    raise MeasurementError(
        f"The source version's {len(tests.inputs)} test inputs do not have one answer each.", hint=hint
    )
