"""The one exception tree: every error says what to do next, and whether trying again can help."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from pydantic import ValidationError


class CompileflowError(Exception):
    """Base of every error that compileflow raises on purpose.

    Args:
        message: What was asked and what was found, in one line.
        hint: What to do about it, in one line.
        log_path: File with what the toolchain itself printed, where there is one.

    Attributes:
        retryable: Whether the same call may succeed later without anyone changing anything. This alone
            decides a Prefect retry.
    """

    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str = "", log_path: str = "") -> None:
        self.message = one_line(message)
        self.hint = one_line(hint)
        self.log_path = log_path
        super().__init__(self.message, self.hint)

    def __str__(self) -> str:
        log = f"Log: {self.log_path}" if self.log_path else ""
        return " ".join(part for part in (self.message, self.hint, log) if part)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self).__name__, self.message, self.hint, self.log_path)

    def to_dict(self) -> dict[str, str]:
        """Return a JSON-able form that `from_dict` turns back into the same error."""
        return {
            "type": type(self).__name__,
            "message": self.message,
            "hint": self.hint,
            "log_path": self.log_path,
        }

    @staticmethod
    def from_dict(data: dict[str, str]) -> CompileflowError:
        """Rebuild an error that crossed a process boundary."""
        return _rebuild(data["type"], data["message"], data.get("hint", ""), data.get("log_path", ""))


class SpecError(CompileflowError):
    """The request itself is wrong: an unknown name, or values that contradict one another."""


class SourceError(CompileflowError):
    """The source model is absent, incomplete or unusable as it is."""


class SourceUnavailableError(SourceError):
    """The place that holds the source model did not answer."""

    retryable = True


class CompileError(CompileflowError):
    """The toolchain refused or failed to compile the model."""


class TargetUnavailableError(CompileflowError):
    """The target's toolchain or runtime is missing on this machine."""


class ProcessError(CompileflowError):
    """A child process ended without an answer."""


class ProcessKilledError(ProcessError):
    """A child process was ended by a signal."""


class ProcessTimeoutError(ProcessError):
    """A child process ran past its time limit and was killed."""


class OutOfMemoryError(ProcessError):
    """A child process needed more memory than there was."""


class StoreError(CompileflowError):
    """The artifact store refused or could not do what was asked."""


class StoreUnavailableError(StoreError):
    """The artifact store did not answer."""

    retryable = True


class IntegrityError(StoreError):
    """Bytes differ from their digest, a file is missing, or a path leaves its folder."""


class SignatureError(CompileflowError):
    """What is said of an artifact is not signed by a trusted key, is on another artifact, or was altered."""


class ManifestError(CompileflowError):
    """A manifest.json is absent, unreadable or of an unknown schema_version."""


class LoadError(CompileflowError):
    """A compiled model cannot be loaded here."""


class InputError(CompileflowError, ValueError):
    """A compiled model was called with inputs that it was not compiled for."""


class MeasurementError(CompileflowError):
    """A validation could not be made; it counts as the verdict `error`, never as a pass."""


class VerdictError(CompileflowError):
    """The compiled model did not pass its gates."""


class StepOffError(CompileflowError):
    """A step is switched off and what it would have made is not there to be reused."""


class RegistryError(CompileflowError):
    """The model registry refused or could not do what was asked."""


class RegistryUnavailableError(RegistryError):
    """The model registry did not answer."""

    retryable = True


def one_line(text: str) -> str:
    """Fold all white space, so that an error is one line wherever it is printed."""
    return " ".join(text.split())


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text that says something, cut to 300 characters, without a full stop."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)[:300].rstrip(".:")


def first_problem(error: ValidationError, *, show_input: bool = False) -> str:
    """Return the first problem of a pydantic error as "field.path: message", without a full stop.

    Args:
        error: What pydantic raised.
        show_input: Append the offending value. Leave it off where the value may be a secret.
    """
    problem = error.errors(include_url=False, include_input=show_input)[0]
    path = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ").rstrip(".")
    got = f", got {problem['input']!r}" if show_input and path else ""
    return f"{path}: {message}{got}" if path else message


def _rebuild(name: str, message: str, hint: str, log_path: str) -> CompileflowError:
    return _tree().get(name, CompileflowError)(message, hint=hint, log_path=log_path)


def _tree() -> dict[str, type[CompileflowError]]:
    found: dict[str, type[CompileflowError]] = {}
    todo: list[type[CompileflowError]] = [CompileflowError]
    while todo:
        kind = todo.pop()
        found[kind.__name__] = kind
        todo.extend(kind.__subclasses__())
    return found
