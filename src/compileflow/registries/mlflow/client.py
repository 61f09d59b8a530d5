"""The client of MLflow that registry and source share: its place, calls with time limits, errors in one line.

mlflow reads its limits and credentials from the environment. It writes to standard output, to its own loggers, and
by default to its makers' telemetry. All of this is changed for one block and then restored; only one block of a
process runs at a time.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from pydantic import SecretStr

from compileflow._process.state import environment
from compileflow.errors import CompileflowError, SpecError, first_line
from compileflow.settings import get_settings

SCHEME = "mlflow:"
# One request ends after at most a minute and a few seconds: three tries of 20 s, 0 and 2 s apart. Variables that
# the user has set stay.
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
_CREDENTIALS = (
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_AUTH",
)
_OBJECT_STORES = ("s3", "gs", "wasbs", "abfss", "hdfs")
_LOGGERS = ("mlflow", "alembic", "urllib3.connectionpool")
_ONE_AT_A_TIME = threading.RLock()
PAGE = 500


@dataclass(frozen=True)
class MlflowPlace:
    """A tracking server, or the SQLite file of one.

    Attributes:
        tracking_uri: URI for mlflow, without credentials.
        username: User of the server, if the URI names one; otherwise mlflow's own configuration applies, if the
            settings or MLFLOW_TRACKING_URI name the server.
        password: Password of that user.
    """

    tracking_uri: str
    username: str = ""
    password: SecretStr | None = None

    @property
    def uri(self) -> str:
        """The place in compileflow's form, without credentials, so that errors may show it."""
        return SCHEME + self.tracking_uri

    @property
    def file(self) -> Path | None:
        """The SQLite file; None for a server."""
        if not self.tracking_uri.startswith("sqlite:"):
            return None
        return Path(self.tracking_uri.removeprefix("sqlite:///"))

    @property
    def artifact_folder(self) -> Path | None:
        """Folder beside the SQLite file in which compileflow keeps the files of runs; None for a server."""
        return self.file.with_suffix(".artifacts") if self.file is not None else None

    def files_at(self, uri: str) -> Any | None:
        """Return MLflow's repository of the files at a URI; None if they are where they must not be.

        Writers of MLflow choose these URIs, and MLflow would send its password to any of them and read
        any folder. A server keeps files itself or in an object store. A SQLite file has them beside it, in
        `artifact_folder`, or in MLflow's own folders mlruns and mlartifacts.
        """
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        repository = get_artifact_repository(uri, self.tracking_uri, self.tracking_uri)
        # runs: and models: lead to another one.
        while hasattr(repository, "repo"):
            repository = repository.repo
        location = str(repository.artifact_uri)
        # Libraries do not agree on where the host of such a URL ends.
        if "\\" in location or not location.isprintable():
            return None
        found = urlsplit(location)
        if found.scheme in ("http", "https"):
            is_own = self.file is None and "@" not in found.netloc and _origin(found) == self._origin
            return repository if is_own else None
        if found.scheme not in ("", "file"):
            return repository if found.scheme in _OBJECT_STORES else None
        # The folder that MLflow reads, which need not be the path of the URI.
        folder = getattr(repository, "artifact_dir", None)
        if self.file is None or self.artifact_folder is None or folder is None:
            return None
        names = (self.artifact_folder.name, "mlruns", "mlartifacts")
        # A link in the place of one of them leads elsewhere.
        own_folders = [self.file.parent.resolve() / name for name in names]
        return repository if any(Path(folder).resolve().is_relative_to(own) for own in own_folders) else None

    @contextmanager
    def calls(
        self, action: str, *, refused: type[CompileflowError], unavailable: type[CompileflowError]
    ) -> Iterator[Any]:
        """Give an `MlflowClient` for a block in which each request has a time limit.

        Args:
            action: Description of the calls for errors, for example "register ner".
            refused: Class of errors for requests that MLflow refuses.
            unavailable: Class of errors for an MLflow that does not answer.
        """
        with _ONE_AT_A_TIME, ExitStack() as stack:
            limits = {name: value for name, value in LIMITS.items() if name not in os.environ}
            # Parts of mlflow ask the place that these name.
            places = dict.fromkeys(("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"), self.tracking_uri)
            stack.enter_context(environment(**limits, **_QUIET, **self._credentials(), **places))
            stack.enter_context(warnings.catch_warnings())
            # A caller cannot act on the warnings of mlflow's imports.
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
                raise self._error(kind, action, error) from error
            except (OSError, ValueError) as error:
                # Errors of requests are OSErrors; a truncated reply is invalid JSON, a ValueError.
                raise self._error(unavailable, action, error) from error

    def _credentials(self) -> dict[str, str]:
        """Return variables with the credentials of the URI, or without any if another server's are configured."""
        if self.password is not None:
            return {
                "MLFLOW_TRACKING_USERNAME": self.username,
                "MLFLOW_TRACKING_PASSWORD": self.password.get_secret_value(),
            }
        if self.file is not None or self._origin in _configured_origins():
            return {}
        # mlflow would send them to any host. It also reads them from a file of the home folder.
        hidden = dict.fromkeys(_CREDENTIALS, "")
        return hidden | ({"HOME": os.devnull} if Path("~/.mlflow/credentials").expanduser().exists() else {})

    @property
    def _origin(self) -> tuple[str, str | None, int | None]:
        return _origin(urlsplit(self.tracking_uri))

    def _may_pass(self, error: Any) -> bool:
        if self.file is not None:
            return "locked" in str(error)
        status: int = error.get_http_status_code()
        return status >= 500 or status in (408, 429)

    def _error(self, kind: type[CompileflowError], action: str, error: Exception) -> CompileflowError:
        hints = {
            "UNAUTHENTICATED": "Set MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and _PASSWORD. Only a "
            "server that MLFLOW_TRACKING_URI or COMPILEFLOW_REGISTRY_URI names gets them.",
            "PERMISSION_DENIED": "Ask the owner of that MLflow for access.",
        }
        default_hint = "Check that MLflow runs there, and try again." if kind.retryable else "MLflow refused it."
        hint = hints.get(error_code(error), default_hint)
        return kind(f"MLflow at {self.tracking_uri} could not {action}: {_reason(error)}.", hint=hint)


def _origin(url: SplitResult) -> tuple[str, str | None, int | None]:
    return url.scheme, url.hostname, url.port or {"http": 80, "https": 443}.get(url.scheme)


def parse_place(uri: str) -> MlflowPlace:
    """Read mlflow:http://host:port, mlflow:https://..., or mlflow:sqlite:////absolute/path.db.

    Raises:
        SpecError: The URI has another form. The message omits the URI, which may hold a password.
    """
    tracking_uri = uri.removeprefix(SCHEME)
    try:
        parts = urlsplit(tracking_uri)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        # The text of this error may be a password: it is not the cause of ours, which is raised below.
        parts, port = urlsplit(""), ""
    if parts.scheme in ("http", "https") and parts.hostname:
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        return MlflowPlace(
            f"{parts.scheme}://{host}{port}{parts.path.rstrip('/')}",
            unquote(parts.username or ""),
            SecretStr(unquote(parts.password)) if parts.password else None,
        )
    if tracking_uri.startswith("sqlite:////") and len(tracking_uri) > len("sqlite:////"):
        return MlflowPlace(tracking_uri)
    raise _not_a_place()


def _configured_origins() -> set[tuple[str, str | None, int | None]]:
    """Return scheme, host and port of each MLflow server that the settings name."""
    origins = set()
    tracking_uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    for uri in (*get_settings().resolved_registry_uris(), f"{SCHEME}{tracking_uri}"):
        # The variable may have a form that only mlflow knows.
        with suppress(SpecError):
            if uri.startswith(SCHEME):
                origins.add(parse_place(uri)._origin)
    return origins


def pages(search: Any, query: str, **settings: Any) -> Iterator[Any]:
    """Yield everything that a search of the client finds, page by page."""
    token = None
    while True:
        page = search(query, page_token=token, **({"max_results": PAGE} | settings))
        yield from page
        token = page.token
        if not token:
            return


def error_code(error: BaseException | None) -> str:
    """Return MLflow's code of an error, "" without a code."""
    return str(getattr(error, "error_code", ""))


def _not_a_place() -> SpecError:
    return SpecError(
        "Expected the URI of an MLflow server or file.",
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
    # MLflow passes on SQLite's errors when it opens a file.
    return MlflowException, SQLAlchemyError


def _reason(error: Exception) -> str:
    """Return the cause of a failed connection, which MLflow puts behind two long URLs, or the first line."""
    cause = re.search(r"\(Caused by (\w+\(.*\))\)$", str(error), re.DOTALL)
    return re.sub(r"HTTPS?Connection(Pool)?\([^)]*\): ", "", cause[1]) if cause else first_line(error)


def _forget() -> None:
    """In a forked process: the thread that holds the parent's lock does not exist."""
    global _ONE_AT_A_TIME
    _ONE_AT_A_TIME = threading.RLock()


os.register_at_fork(after_in_child=_forget)


@contextmanager
def _quiet_loggers() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
