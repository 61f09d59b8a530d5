"""The exception tree: every error has a message, a hint, and says whether a retry can help."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar
from urllib.parse import quote

if TYPE_CHECKING:
    from pydantic import ValidationError


# A message may quote a file that a stranger wrote.
_LONGEST_TEXT = 2000
_LONGEST_VALUE = 60
# Longest text that is searched for secrets; what follows is cut off.
_LONGEST_SEARCHED = 10 * _LONGEST_TEXT
_WORD = re.compile(r"[^\s'\"<>]+")
# User and password in a URL. A password may hold a slash; a port does not stand before an @. What stands before
# the @ of hf://NAME@REVISION is not a user, nor is a model in http://host:port#NAME@NUMBER.
_USER = re.compile(r"(?<!hf):/+(?:[^/?#]*@|[^/@:]*:(?!(?:\d+|port)[/#])[^@]*@)")
# Tokens that tell what they are: of the Hub, of AWS, and base64 of JSON, as Neptune's.
_TOKEN = re.compile(r"hf_\w{20,}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\beyJ[\w-]{16,}[\w.=-]*")
# Shorter values would also be found in other words.
_SHORTEST_SECRET = 8
_hidden: set[str] = set()
Error = TypeVar("Error", bound=BaseException)
# What a field expects, by the first word of the type of pydantic's error.
_EXPECTED = {
    "bool": "true or false", "dict": "an object", "float": "a number", "int": "a whole number", "list": "a list",
    "model": "an object", "string": "text", "tuple": "a list",
}  # fmt: skip
_BOUNDS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}
_LENGTHS = {
    "string_too_short": ("at least", "min_length", "characters"),
    "string_too_long": ("at most", "max_length", "characters"),
    "too_short": ("at least", "min_length", "items"),
    "too_long": ("at most", "max_length", "items"),
}
_FIXED_WORDS = {
    "extra_forbidden": "this name is not known",
    "finite_number": "expected a finite number",
    "missing": "a value is required",
}


class CompileflowError(Exception):
    """Base class of every error that compileflow raises on purpose.

    Args:
        message: One line: what was requested, and what was found.
        hint: One line: what to do.
        log_path: File with the output of the toolchain; "" without one.
        report_uri: Stored report or comparison that gives the details; "" without one.

    Attributes:
        retryable: Whether the same call may succeed later although nothing was changed. Prefect retries a task
            only if this is True.
    """

    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str = "", log_path: str = "", report_uri: str = "") -> None:
        self.message = _shortened(without_secrets(one_line(message)))
        self.hint = _shortened(without_secrets(one_line(hint)))
        self.log_path = log_path
        self.report_uri = report_uri
        super().__init__(self.message, self.hint)

    def __str__(self) -> str:
        log = f"Log: {self.log_path}" if self.log_path else ""
        return " ".join(part for part in (self.message, self.hint, log) if part)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return CompileflowError.from_dict, (self.to_dict(),)

    def to_dict(self) -> dict[str, str]:
        """Return a form that can be written as JSON; `from_dict` rebuilds the error from it."""
        return {
            "type": type(self).__name__,
            "message": self.message,
            "hint": self.hint,
            "log_path": self.log_path,
            "report_uri": self.report_uri,
        }

    @staticmethod
    def from_dict(data: dict[str, str]) -> CompileflowError:
        """Rebuild an error that came from another process."""
        more = {name: data.get(name, "") for name in ("hint", "log_path", "report_uri")}
        return _tree().get(data["type"], CompileflowError)(data["message"], **more)


class SpecError(CompileflowError):
    """The request is wrong: a name is unknown, or values contradict one another."""


class SourceError(CompileflowError):
    """The source model is missing, incomplete or unusable."""


class SourceUnavailableError(SourceError):
    """The place that holds the source model did not answer."""

    retryable = True


class CompileError(CompileflowError):
    """The toolchain refused or failed to compile the model."""


class TargetUnavailableError(CompileflowError):
    """The target's toolchain or runtime is missing on this machine."""


class MissingPackageError(CompileflowError):
    """A package that the request needs is not installed."""


class ProcessError(CompileflowError):
    """A child process ended without an answer."""


class ProcessKilledError(ProcessError):
    """A child process was ended by a signal."""


class ProcessTimeoutError(ProcessError):
    """A child process ran past its time limit and was killed."""


class RunLostError(ProcessError):
    """A run ended without an outcome, for example because its worker was killed."""

    retryable = True


class OutOfMemoryError(ProcessError):
    """A child process needed more memory than the machine has."""


class StoreError(CompileflowError):
    """The artifact store refused an operation or failed."""


class StoreUnavailableError(StoreError):
    """The artifact store did not answer."""

    retryable = True


class IntegrityError(StoreError):
    """Bytes differ from their digest, a file is missing, or a path leaves its folder."""


class SignatureError(CompileflowError):
    """The artifact's attestation is unsigned, untrusted, altered, or belongs to another artifact."""


class ManifestError(CompileflowError):
    """A manifest.json is missing, unreadable, or has an unknown schema_version."""


class LoadError(CompileflowError):
    """A compiled model cannot be loaded on this machine."""


class InputError(CompileflowError, ValueError):
    """A compiled model was called with inputs that it was not compiled for."""


class MeasurementError(CompileflowError):
    """A validation could not be completed. It counts as the verdict `error`, never as `pass`."""


class VerdictError(CompileflowError):
    """The compiled model did not pass its gates."""


class StepOffError(CompileflowError):
    """A step is switched off, and the store holds no earlier output of it."""


class RegistryError(CompileflowError):
    """The model registry refused an operation or failed."""


class EmptyRegistryError(RegistryError):
    """The model registries hold no version."""


class RegistryUnavailableError(RegistryError):
    """The model registry did not answer."""

    retryable = True


def one_line(text: str) -> str:
    """Collapse all white space and escape control characters, so that an error is one line of plain text."""
    return printable(" ".join(text.split()))


def hide(values: Iterable[str | None]) -> None:
    """From now on, replace these secrets wherever a text of an error holds them."""
    secrets = [value for value in values if value and len(value) >= _SHORTEST_SECRET]
    _hidden.update(secrets, map(quote, secrets))


def without_secrets(text: str) -> str:
    """Replace what is secret in a text.

    That is user, password and query string of each URL, because a presigned URL has its signature there; tokens of
    known forms; and the secrets that this process knows, which may stand in a wrong place.
    """
    text = text[:_LONGEST_SEARCHED]
    for secret in _hidden:
        text = text.replace(secret, "***")
    return _TOKEN.sub("***", _WORD.sub(_without_secrets, text))


def redacted(error: Error) -> Error:
    """Replace what is secret in the texts of a foreign error and of its causes, which a traceback shows."""
    cause: BaseException | None = error
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        cause.args = tuple(without_secrets(part) if isinstance(part, str) else part for part in cause.args)
        if isinstance(cause, OSError) and isinstance(cause.filename, str):
            cause.filename = without_secrets(cause.filename)
        cause = cause.__cause__ or cause.__context__
    return error


def _without_secrets(match: re.Match[str]) -> str:
    head, _, query = match[0].partition("?")
    word = f"{head}?***" if "=" in query else match[0]
    return _USER.sub("://***@", word)


def printable(text: str) -> str:
    """Escape the characters that a terminal obeys or hides, such as ESC and the marks that reverse text."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def in_words(value: Any) -> str:
    """Return a short value as Python writes it, cut to 60 characters, and the type of any other one."""
    is_plain = value is None or isinstance(value, str | int | float | list | tuple | dict)
    return _cut(repr(value)) if is_plain else f"a value of the type {type(value).__name__}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text that is not empty, cut to 300 characters, without a full stop.

    Of an error of the operating system, this is its reason alone, without the number and the path. TorchScript
    puts a traceback before the reason.
    """
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    line = lines[-1] if "TorchScript interpreter" in lines[0] else lines[0]
    return line[:300].rstrip(".:")


def first_problem(error: ValidationError, *, show_input: bool = False) -> str:
    """Return the first problem of a pydantic error as "field.path: message", without a full stop.

    Args:
        error: Error of a pydantic model.
        show_input: Append the wrong value. Do not use it if the value may be a secret.
    """
    problem = error.errors(include_url=False, include_input=show_input)[0]
    path = ".".join(str(part) for part in problem["loc"])
    message = expectation(problem)
    is_unknown = problem["type"] == "extra_forbidden"
    found_value = f", got {problem['input']!r}" if show_input and path and not is_unknown else ""
    return f"{path}: {message}{found_value}" if path else message


def field_problem(problems: Sequence[Mapping[str, Any]], content: Any) -> tuple[str, str]:
    """Return the first wrong field of a JSON value, and what is wrong: "stop", "expected text or a list, got 5".

    Of a field with several types, pydantic reports a problem for each one, with the name of the type in the path.

    Args:
        problems: What `ValidationError.errors` lists.
        content: The JSON value that was checked; it tells the names of fields from those of types.

    Returns:
        The path of the field, "" for the content itself; and the problem without a full stop.
    """
    paths = [_path_in(content, problem) for problem in problems]
    path = paths[0]
    # The type that the value has, if any, reports what is wrong inside it.
    while inner_paths := [inner for inner in paths if len(inner) > len(path) and inner[: len(path)] == path]:
        path = inner_paths[0]
    reports = [problem for problem, its_path in zip(problems, paths, strict=True) if its_path == path]
    reports = [report for report in reports if not report["type"].endswith("_type")] or reports
    *most, last = dict.fromkeys(map(expectation, reports))
    words = f"{', '.join(most)} or {last}".replace(", expected ", ", ").replace(" or expected ", " or ")
    words = words if most else last
    if reports[0]["type"] not in ("missing", "extra_forbidden", "json_invalid"):
        # Python's constants are not JSON.
        words = words.replace("expected False", "expected false").replace("expected True", "expected true")
        words = f"{words}, got {_cut(printable(json.dumps(reports[0]['input'], ensure_ascii=False)))}"
    return ".".join(path), words


def _path_in(content: Any, problem: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the path of a problem, without the names of types."""
    path = []
    for part in problem["loc"]:
        is_field = part in content if isinstance(content, Mapping) else isinstance(part, int)
        if is_field and isinstance(content, Mapping | list | tuple):
            content = content[part]
            path.append(str(part))
    return (*path, str(problem["loc"][-1])) if problem["type"] == "missing" else tuple(path)


def expectation(problem: Mapping[str, Any]) -> str:
    """Return what was expected, without a full stop: pydantic's words suit the author of a model, not its user.

    Args:
        problem: One of the problems that `ValidationError.errors` lists.
    """
    kind, context = problem["type"], problem.get("ctx", {})
    if kind in _FIXED_WORDS:
        return _FIXED_WORDS[kind]
    if kind in _BOUNDS:
        words, key = _BOUNDS[kind]
        return f"expected {words} {context[key]:.12g}"
    if kind in _LENGTHS:
        words, key, items = _LENGTHS[kind]
        return f"expected {words} {context[key]} {items if context[key] > 1 else items.removesuffix('s')}"
    expected = context.get("expected")
    if kind.endswith(("_type", "_parsing", "_from_float")):
        expected = _EXPECTED.get(kind.partition("_")[0])
    message = str(problem["msg"]).removeprefix("Value error, ").rstrip(".")
    return f"expected {expected}" if expected else message


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}..."


def _tree() -> dict[str, type[CompileflowError]]:
    classes: dict[str, type[CompileflowError]] = {}
    pending: list[type[CompileflowError]] = [CompileflowError]
    while pending:
        kind = pending.pop()
        classes[kind.__name__] = kind
        pending.extend(kind.__subclasses__())
    return classes
