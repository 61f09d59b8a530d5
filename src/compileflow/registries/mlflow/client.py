"""MLflow as the registry and the source use it: where it is, calls that end in time, errors in one line.

mlflow reads its limits and credentials from the environment, and talks: on standard output, on loggers of its own
and, unless told otherwise, to its makers. All of that is set for the length of a block and put back, one block of
a process at a time.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from pydantic import SecretStr

from compileflow._process.state import environment
from compileflow.errors import CompileflowError, SpecError, first_line

SCHEME = "mlflow:"
# One request ends after a minute and a few seconds at the latest: three tries of 20 s, 0 and 2 s apart. Whoever
# sets a variable himself is not overruled.
LIMITS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0",
}
_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
_LOGGERS = ("mlflow", "alembic", "urllib3.connectionpool")
_ONE_AT_A_TIME = threading.RLock()


@dataclass(frozen=True)
class MlflowPlace:
    """A tracking server, or the SQLite file of one.

    Attributes:
        tracking_uri: As mlflow takes it, without credentials.
        username: Of the server, where the URI named one; otherwise mlflow's own configuration counts.
        password: Its password.
    """

    tracking_uri: str
    username: str = ""
    password: SecretStr | None = None

    @property
    def uri(self) -> str:
        """The place as compileflow writes it, without credentials: it may be shown."""
        return SCHEME + self.tracking_uri

    @property
    def file(self) -> Path | None:
        """The SQLite file; None for a server."""
        if not self.tracking_uri.startswith("sqlite:"):
            return None
        return Path(self.tracking_uri.removeprefix("sqlite:///"))

    @contextmanager
    def calls(
        self, doing: str, *, refused: type[CompileflowError], unavailable: type[CompileflowError]
    ) -> Iterator[Any]:
        """Give an `MlflowClient` for a block in which each request is bounded in time.

        Args:
            doing: For errors, for example "register ner".
            refused: Error for what MLflow does not do.
            unavailable: Error for an MLflow that does not answer.
        """
        with _ONE_AT_A_TIME, ExitStack() as stack:
            limits = {name: value for name, value in LIMITS.items() if name not in os.environ}
            stack.enter_context(environment(**limits, **_QUIET, **self._credentials()))
            stack.enter_context(warnings.catch_warnings())
            # What mlflow's imports warn of is nothing that our caller could change.
            warnings.simplefilter("ignore")
            mlflow_exceptions = _import_exceptions(refused)
            stack.enter_context(_quiet_loggers())
            try:
                from mlflow import MlflowClient

                yield MlflowClient(tracking_uri=self.tracking_uri, registry_uri=self.tracking_uri)
            except CompileflowError:
                raise
            except mlflow_exceptions as error:
                kind = unavailable if self._may_pass(error) else refused
                raise self._error(kind, doing, error) from error
            except (OSError, ValueError) as error:
                # requests' errors are OSErrors; a reply that is cut off is no JSON.
                raise self._error(unavailable, doing, error) from error

    def _credentials(self) -> dict[str, str]:
        if self.password is None:
            return {}
        return {
            "MLFLOW_TRACKING_USERNAME": self.username,
            "MLFLOW_TRACKING_PASSWORD": self.password.get_secret_value(),
        }

    def _may_pass(self, error: Any) -> bool:
        if self.file is not None:
            return "locked" in str(error)
        status: int = error.get_http_status_code()
        return status >= 500 or status in (408, 429)

    def _error(self, kind: type[CompileflowError], doing: str, error: Exception) -> CompileflowError:
        hints = {
            "UNAUTHENTICATED": "Set MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and _PASSWORD.",
            "PERMISSION_DENIED": "Ask for the right to do so on that MLflow.",
        }
        otherwise = "Check that MLflow runs there, and try again." if kind.retryable else "MLflow refused it."
        hint = hints.get(getattr(error, "error_code", ""), otherwise)
        return kind(f"MLflow at {self.tracking_uri} could not {doing}: {_reason(error)}.", hint=hint)


def parse_place(uri: str) -> MlflowPlace:
    """Read mlflow:http://host:port, mlflow:https://..., or mlflow:sqlite:////absolute/path.db.

    Raises:
        SpecError: it is none of these. The URI is not repeated, as it may hold a password.
    """
    tracking_uri = uri.removeprefix(SCHEME)
    try:
        parts = urlsplit(tracking_uri)
        port = f":{parts.port}" if parts.port else ""
    except ValueError as error:
        raise _no_place() from error
    if parts.scheme in ("http", "https") and parts.hostname:
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        return MlflowPlace(
            f"{parts.scheme}://{host}{port}{parts.path.rstrip('/')}",
            unquote(parts.username or ""),
            SecretStr(unquote(parts.password)) if parts.password else None,
        )
    if tracking_uri.startswith("sqlite:////") and len(tracking_uri) > len("sqlite:////"):
        return MlflowPlace(tracking_uri)
    raise _no_place()


def error_code(error: BaseException | None) -> str:
    """Return MLflow's own name for what went wrong, "" where it has none."""
    return str(getattr(error, "error_code", ""))


def _no_place() -> SpecError:
    return SpecError(
        "That is no MLflow that can be reached.",
        hint="Write it as mlflow:http://host:port or mlflow:sqlite:////absolute/path.db.",
    )


def _import_exceptions(refused: type[CompileflowError]) -> tuple[type[Exception], ...]:
    try:
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError as error:
        raise refused(
            f"MLflow's client is not installed ({error}).", hint="Try: pip install 'compileflow[mlflow]'."
        ) from error
    # What SQLite says at the opening of a file comes as it is.
    return MlflowException, SQLAlchemyError


def _reason(error: Exception) -> str:
    """Return what urllib3 gave up on, which MLflow puts behind two long URLs; otherwise the first line."""
    caused = re.search(r"\(Caused by (\w+\(.*\))\)$", str(error), re.DOTALL)
    return re.sub(r"HTTPS?Connection(Pool)?\([^)]*\): ", "", caused[1]) if caused else first_line(error)


def _forget() -> None:
    """In a forked process: no thread is there that would let go of the parent's lock."""
    global _ONE_AT_A_TIME
    _ONE_AT_A_TIME = threading.RLock()


os.register_at_fork(after_in_child=_forget)


@contextmanager
def _quiet_loggers() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
