"""Classes of failure: what the error of a toolchain means, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from compileflow.errors import (
    CompileError,
    CompileflowError,
    OutOfMemoryError,
    ProcessError,
    ProcessTimeoutError,
    first_line,
)
from compileflow.spec import ShapeBucket

FailureKind = Literal["memory", "disk", "operator", "opset", "branch", "shape"]

_MORE_MEMORY = "Lower max_sequence_length, or run it on a machine with more memory."
_HINTS: Mapping[FailureKind, str] = {
    "memory": _MORE_MEMORY,
    "disk": "Free some space there, or set COMPILEFLOW_HOME to a folder on a larger disk.",
    "operator": "Choose a target that has the operator; `compileflow targets` lists all targets.",
    "opset": "Leave the option opset out, so that the exporter chooses, or update the runtime.",
    "branch": "A graph cannot branch on the values that it computes. In the model's code, compute both sides and "
    "choose with torch.where.",
    "shape": "The model's code does not work for every size. Choose a target with fixed shapes.",
}
# Patterns in their order of trial. A group is the operator.
_PATTERNS: Sequence[tuple[FailureKind, str]] = (
    (
        "memory",
        r"(?:can't|cannot|unable to|failed to) allocate|bad_alloc|bad allocation|out of memory|"
        r"virtual memory exhausted|not enough memory|memory allocation (?:of .* )?failed|"
        r"terminated program cc1plus",
    ),
    (
        "disk",
        # torch's writer compares places in its file.
        r"no space left on device|disk quota exceeded|\bENOSPC\b|"
        r"inline_container\.cc[^\n]*(?:unexpected pos|file write failed)",
    ),
    ("opset", r"was added in version \d+, try exporting with this version"),
    ("operator", r"No ONNX function found for <OpOverload\(op='([\w.:]+)'"),
    ("operator", r"Exporting the operator '([\w:]+)' to ONNX"),
    ("operator", r"operator with unrecognized namespace ([\w:]+)"),
    ("operator", r"No conversion rule found for operations: ([\w.:]+)"),
    ("operator", r"^\s*-- ([\w:.]+) with a message"),
    ("operator", r"UnsupportedOperatorException: ([\w.:]+)"),
    ("operator", r"missing (?:lowering|decomposition)\s+target: ([\w.:]+)"),
    ("operator", r"Could not run '([\w:.]+)' with arguments"),
    ("operator", r"(\w+::\w+): attempted to run this operator with Meta tensors"),
    ("operator", r"Could not find an implementation for ([\w.:]+)\("),
    ("operator", r"([\w.]+:\w+)\(-?\d+\) is not a registered function/op"),
    ("operator", r"(?:unsupported|unknown) (?:operator|op|operation)s?:? '?\"?([\w.]+(?:::?\w+)?)"),
    (
        "operator",
        r"\b((?!std::|c10::|at::|torch::|onnx)\w+::\w+)'?\"?\s(?:\w+ ){0,3}"
        r"(?:not supported|unsupported|not implemented)",
    ),
    ("opset", r"unsupported model IR version|under development and support|No (?:Op registered|adapter) for"),
    ("opset", r"opset[^\n]{0,60}(?:not supported|unsupported)|(?:not support|unsupported)[^\n]{0,60}opset"),
    ("branch", r"data.?dependent|dynamic control flow|DynamicOutputShape"),
    ("shape", r"constraints? ?violat|dynamic[_ ](?:shape|dim)|symbolic shape|specialized .*constant"),
)
_NEWER_OPSET = re.compile(r"was added in version (\d+)")
# Longest text that is searched, of each error.
_LONGEST = 20_000


@dataclass(frozen=True)
class Failure:
    """One class of failure.

    Attributes:
        kind: memory: more was needed than the machine has. disk: a disk is full. operator: the toolchain lacks
            one. opset: the ONNX opset does not suit. branch: the model branches on computed values. shape: a
            size cannot vary.
        hint: What to do.
        operator: Missing operator as namespace.name, for example aten.fft_rfft; "" for other kinds.
    """

    kind: FailureKind
    hint: str
    operator: str = ""


def failure_of(error: BaseException) -> Failure | None:
    """Return the class of an error or of its innermost cause that has one; None if none is known."""
    # The outer errors of exporters hold pages of advice.
    for cause in reversed(list(causes(error))):
        if isinstance(cause, MemoryError | OutOfMemoryError):
            return Failure("memory", _MORE_MEMORY)
        failure = failure_in(f"{type(cause).__name__}: {cause}")
        if failure is not None:
            return failure
    return None


def failure_in(text: str) -> Failure | None:
    """Return the class of failure that a text of a toolchain tells; None if it tells none."""
    text = text[:_LONGEST]
    for kind, pattern in _PATTERNS:
        match = re.search(pattern, text, re.IGNORECASE | re.MULTILINE)
        if match is None:
            continue
        newer = _NEWER_OPSET.search(match[0])
        hint = f"Set the option opset to {newer[1]} or more." if newer else _HINTS[kind]
        return Failure(kind, hint, operator=_operator(match[1]) if kind == "operator" else "")
    return None


def compile_error(message: str, error: BaseException, *, hint: str) -> CompileflowError:
    """Return the error for a failure of a toolchain: an OutOfMemoryError, or a CompileError.

    Args:
        message: What failed.
        error: What the toolchain raised.
        hint: What to do about a failure without a class.
    """
    failure = failure_of(error)
    kind = OutOfMemoryError if failure is not None and failure.kind == "memory" else CompileError
    return kind(message, hint=failure.hint if failure is not None else hint)


def raise_if_out_of_memory(error: Exception) -> None:
    """Turn a library's error into a MemoryError if it tells a lack of memory: libraries have kinds of their own.

    Raises:
        MemoryError: It does.
    """
    failure = failure_of(error)
    if failure is not None and failure.kind == "memory":
        raise MemoryError(first_line(error)) from error


def smaller_request(
    error: ProcessError,
    *,
    buckets: Sequence[ShapeBucket] = (),
    longest: int | None = None,
    any_shape: bool = False,
    threads: int = 1,
    limit: str = "",
) -> str:
    """Return the hint for a child process that died: what to change in its request, the smallest change first.

    Args:
        error: How the process ended.
        buckets: Shape buckets of the request; () for those of the target's own choice.
        longest: Longest row of the request; None for the longest of the model.
        any_shape: The compiled model takes any shape, without buckets.
        threads: Threads of the process.
        limit: Time limit of the step, for example "compile_s, now 7200".
    """
    largest = max(buckets, key=lambda bucket: bucket.batch_size * bucket.sequence_length, default=None)
    changes = []
    if any_shape or (largest is not None and largest.batch_size == 1):
        longest = longest or (largest.sequence_length if largest is not None else None)
        changes.append(
            f"lower max_sequence_length from {longest} to {longest // 2}"
            if longest is not None and longest > 1
            else "lower max_sequence_length"
        )
    elif largest is None:
        changes.append("give small shape_buckets, such as 1x128")
    else:
        half = ShapeBucket(batch_size=largest.batch_size // 2, sequence_length=largest.sequence_length)
        changes.append(f"give {half} for {largest} in shape_buckets")
    if isinstance(error, ProcessTimeoutError):
        return f"Raise the step's timeout ({limit}), or {changes[0]}."
    if not isinstance(error, OutOfMemoryError):
        return error.hint
    if threads > 1:
        changes.append(f"set COMPILEFLOW_THREADS to {threads // 2}")
    changes.append("use a machine with more memory")
    reason = "" if error.hint in ("", _MORE_MEMORY) else f"{error.hint} "
    return f"{reason}Try in this order: {'; '.join(changes)}."


def causes(error: BaseException) -> Iterator[BaseException]:
    """Return an error and its causes, from the outermost to the innermost."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__


def _operator(name: str) -> str:
    """Return the name of an operator as torch.ops has it, without its overload."""
    if "::" not in name and ":" in name:
        # ONNX Runtime writes domain:operator.
        return name.replace(":", ".")
    return ".".join(name.replace("::", ".").strip(".").split(".")[:2])
