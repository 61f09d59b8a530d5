"""Options of `compile`: their values as fields of a request, and errors in the words of the command line."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compileflow.errors import SpecError, expectation
from compileflow.spec import TARGET_ALIASES, Precision

if TYPE_CHECKING:
    from pydantic import ValidationError

    from compileflow.steps.request import CompileRequest

_ABSENT: tuple[object, ...] = (None, [])
_STEPS = ("fetch", "compile", "validate", "register")
# Options by the path of their field in a request; the longest path counts.
_OPTIONS: Mapping[tuple[str, ...], str] = {
    ("model",): "MODEL",
    ("revision",): "--revision",
    ("target",): "--target",
    ("hf_task",): "--task",
    ("precision",): "--precision",
    ("auto", "precisions"): "--precision",
    ("auto", "targets"): "--among",
    ("auto", "objective", "goal"): "--objective",
    ("auto", "objective", "max_accuracy_loss"): "--max-accuracy-loss",
    ("auto", "objective", "max_serving_memory_bytes"): "--max-memory-mb",
    ("max_sequence_length",): "--max-sequence-length",
    ("shape_buckets",): "--bucket",
    ("components",): "--component",
    ("target_options",): "--option",
    ("trust_remote_code",): "--trust-remote-code",
    ("calibration", "examples_path"): "--calibration",
    ("validation", "examples_path"): "--examples",
    ("validation", "max_examples"): "--max-examples",
    ("validation", "suite_path"): "--suite",
    ("validation", "tests_path"): "--tests",
    ("validation", "latency_shapes"): "--shape",
    ("validation", "max_latency_ratio"): "--max-latency-ratio",
    ("allow_warn",): "--allow-warn",
    ("name",): "--name",
    ("store_uri",): "--store",
    ("registry_uris",): "--registry",
    ("aws_credentials_block",): "--aws-credentials-block",
}
# Names of fields that stand in messages of the library, and mean nothing else.
_NAMES = {path[-1]: option for path, option in _OPTIONS.items() if "_" in path[-1] and path[-1] != "examples_path"}
_NAME = re.compile(rf"(?<![\w./-])(?:[a-z]+\.)*({'|'.join(_NAMES)})(?![\w/-])")


def checked_request(fields: dict[str, Any]) -> CompileRequest:
    """Return the request with these fields.

    Raises:
        SpecError: The target is unknown, or a field is wrong.
    """
    from pydantic import ValidationError

    from compileflow.catalog import target_names
    from compileflow.steps.request import AUTO, CompileRequest

    choices = (AUTO, *target_names())
    target = fields.get("target")
    if target is not None and target not in (*choices, *TARGET_ALIASES):
        raise SpecError(f"Unknown target {target!r}.", hint=f"Choose one of: {', '.join(choices)}.")
    try:
        return CompileRequest.model_validate(fields)
    except ValidationError as error:
        raise SpecError(f"{_problem(error)}.") from error


def in_options(text: str) -> str:
    """Return a message with options in the place of fields of a request.

    >>> in_options("To register it anyway, set allow_warn.")
    'To register it anyway, set --allow-warn.'
    """
    return _NAME.sub(lambda match: _NAMES[match[1]], text)


def model_of(argument: str | None, option: str | None) -> str:
    """Return the model, which is given as an argument or as an option."""
    models = [model for model in (argument, option) if model is not None]
    if not models:
        raise SpecError("No model was given.", hint="Give a model folder, or a Hub id (owner/name).")
    if len(models) > 1:
        raise SpecError(f"Two models were given: {models[0]} and {models[1]}.", hint="Leave --model out.")
    return models[0]


def targets_of(names: Sequence[str]) -> list[str]:
    """Return the targets, each of which is one run.

    Raises:
        SpecError: A target was given twice, or auto with another one.
    """
    targets = [TARGET_ALIASES.get(name, name) for name in names]
    for position, target in enumerate(targets):
        if target in targets[:position]:
            raise SpecError(f"--target {target} was given twice.", hint="Give each target once.")
    if "auto" in targets and len(targets) > 1:
        raise SpecError(
            f"--target auto tries all targets, and {', '.join(set(targets) - {'auto'})} was given as well.",
            hint="Narrow auto with --among, or leave it out.",
        )
    return targets


def bucket_of(text: str) -> dict[str, int]:
    """Return the shape bucket that a text such as 1x128 names."""
    batch_size, cross, length = text.partition("x")
    if not (cross and batch_size.isdecimal() and length.isdecimal()):
        raise SpecError(f"{text!r} is not a shape bucket.", hint="Write it as BATCHxLENGTH, for example 1x128.")
    return {"batch_size": int(batch_size), "sequence_length": int(length)}


def component_of(text: str) -> dict[str, Any]:
    """Return the component that a text such as word=16 names."""
    name, equals, length = text.partition("=")
    if not (equals and length.isdecimal()):
        raise SpecError(f"{text!r} is not a component.", hint="Write it as NAME=LENGTH, for example word=16.")
    return {"name": name, "max_sequence_length": int(length)}


def target_options_of(texts: Sequence[str]) -> dict[str, Any]:
    """Return target options by name, from texts such as opset=18."""
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise SpecError(f"{text!r} is not a target option.", hint="Write it as NAME=VALUE.")
        if name in options:
            raise SpecError(f"--option {name} was given twice.", hint="Give each target option once.")
        try:
            options[name] = json.loads(value)
        except RecursionError as error:
            raise SpecError(
                f"--option {name}: the value is nested too deeply.", hint="Give a number, a name or a short list."
            ) from error
        except ValueError:
            options[name] = value
    return options


def memory_bytes(megabytes: float | None) -> int | None:
    """Return the bytes of --max-memory-mb."""
    if megabytes is None:
        return None
    if not math.isfinite(megabytes) or megabytes <= 0:
        raise SpecError(f"--max-memory-mb: expected a number above 0, got {megabytes:g}.")
    return max(1, int(megabytes * 1e6))


def steps_without(skipped: Collection[str]) -> dict[str, bool]:
    """Return the switches of the steps that are off.

    Raises:
        SpecError: A step does not exist.
    """
    for name in skipped:
        if name not in _STEPS:
            raise SpecError(f"--skip {name}: unknown step {name!r}.", hint=f"The steps are: {', '.join(_STEPS)}.")
    return dict.fromkeys(skipped, False)


def refuse_without_effect(
    targets: Collection[str], skipped: Collection[str], *, auto: Mapping[str, Any], validate: Mapping[str, Any]
) -> None:
    """Refuse options that would be ignored.

    Args:
        targets: Targets of the request.
        skipped: Steps that are off.
        auto: Options of target auto, with their values.
        validate: Options of the validate step, with their values.

    Raises:
        SpecError: An option of auto was given without auto, or one of the validate step, which is off.
    """
    for option, value in auto.items() if "auto" not in targets else ():
        if value not in _ABSENT:
            raise SpecError(
                f"{option} has no effect without --target auto.",
                hint=f"Leave {option} out, or give --target auto.",
            )
    for option, value in validate.items() if "validate" in skipped else ():
        if value not in _ABSENT:
            raise SpecError(
                f"{option} has no effect with --skip validate.",
                hint=f"Leave one of {option} and --skip validate out.",
            )


def refuse_idle_calibration(requests: Sequence[CompileRequest]) -> None:
    """Refuse --calibration if no request compiles static int8, which alone is calibrated.

    Raises:
        SpecError: None does.
    """
    from pydantic import ValidationError

    from compileflow.catalog import get_target

    def may_calibrate(request: CompileRequest) -> bool:
        if request.target == "auto":
            return request.auto.precisions in ((), (Precision.INT8,))
        try:
            options = get_target(request.target).Options.model_validate(request.target_options)
        except ValidationError:
            # Another check names the wrong option.
            return True
        return options.needs_calibration(request.precision)

    if not any(may_calibrate(request) for request in requests):
        raise SpecError(
            "--calibration has no effect: only static int8 is calibrated.",
            hint="Give --precision int8 and --option quantization=static, or leave --calibration out.",
        )


def notes_on(requests: Sequence[CompileRequest]) -> list[str]:
    """Return one line for each target that takes any shape although buckets were given."""
    from compileflow.catalog import get_target

    return [
        f"note: {request.target} takes any shape; it uses --bucket only for the longest input, "
        f"{max(bucket.sequence_length for bucket in request.shape_buckets)}."
        for request in requests
        if request.shape_buckets
        and request.target != "auto"
        and get_target(request.target).capabilities.dynamic_axes
    ]


def _problem(error: ValidationError) -> str:
    """Return the first problem of a request in the words of the command line, without a full stop."""
    problem = error.errors(include_url=False)[0]
    message = expectation(problem)
    path = tuple(part for part in problem["loc"] if isinstance(part, str))
    option = next((_OPTIONS[path[:end]] for end in range(len(path), 0, -1) if path[:end] in _OPTIONS), "")
    if not path:
        return in_options(message)
    return f"{option or '.'.join(path)}: {message}, got {problem['input']!r}"
